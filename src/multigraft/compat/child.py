"""What a child process of an aliased one runs first, by this file's path.

The package `multigraft` is not imported here: a child that never asks for PEFT pays for no torch.
So the files that it needs are loaded under a name of their own, and use the standard library alone.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

PACKAGE = "_multigraft_alias"
SPAWNED = "_multigraft_spawned"
"""The name under which a child of `multiprocessing` runs this file."""


def launcher() -> ModuleType:
    """The module `launch`, without the package around it."""
    if PACKAGE not in sys.modules:
        package = ModuleType(PACKAGE)
        package.__path__ = [str(Path(__file__).resolve().parent)]
        sys.modules[PACKAGE] = package
    return import_module(f"{PACKAGE}.launch")


if __name__ == "__main__":
    launcher().main(sys.argv[1:])
elif __name__ == SPAWNED:
    launcher().take_effect()
