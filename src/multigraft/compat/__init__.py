"""Multigraft under PEFT's name, for programs that import PEFT by themselves. Opt-in.

    from multigraft.compat import install_as_peft

    install_as_peft()                     # before transformers, TRL or diffusers is imported
    from trl import SFTTrainer            # which imports peft, and gets Multigraft

or, for a script as it is, ``python -m multigraft.compat SCRIPT``, which reaches the processes that
the script starts as well. ``import multigraft`` by itself installs nothing.
"""

from __future__ import annotations

from multigraft.compat import alias
from multigraft.compat.alias import Alias

__all__ = ["Alias", "install_as_peft", "is_installed", "uninstall"]


def install_as_peft() -> Alias:
    """Let ``import peft``, and what asks for PEFT's version, find Multigraft in this process.

    PEFT may be installed or not. Calling it again changes nothing.

    Returns:
        The alias; ``with install_as_peft(): ...`` takes it back at the end of the block.

    Raises:
        StateError: PEFT, or a package that has looked for it already, is imported.
    """
    return alias.install()


def uninstall() -> None:
    """Undo `install_as_peft`; what was imported meanwhile keeps the classes that it has."""
    found = alias.installed()
    if found is not None:
        found.uninstall()


def is_installed() -> bool:
    """Whether ``import peft`` means Multigraft now."""
    return alias.installed() is not None
