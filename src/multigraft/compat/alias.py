"""`import peft` finds Multigraft: the finder, what it finds, and its coming and going.

    import peft.tuners.lora ──► Alias.find_spec ──► AliasModule "peft.tuners.lora"
                                                      └─ LoraLayer ──► multigraft.kinds.LoraLayer
    importlib.metadata.version("peft") ──► Alias.find_distributions ──► AliasDistribution

Nothing is written to disk and no name is bound before it is asked for, so that a module of PEFT's
costs nothing until somebody uses it. This file uses the standard library alone: see `child`.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from os import PathLike
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, cast

from .tables import MODULES, VERSION, home_of  # relative, so that `child` can load it by itself

STANDS_FOR = "peft"
DECIDED = ("peft", "transformers", "accelerate", "trl", "diffusers")
"""Packages that know for good whether PEFT is there once they are imported."""


class AliasModule(ModuleType):
    """A module of PEFT's, whose names are Multigraft's."""

    def __getattr__(self, name: str) -> Any:
        own = self.__name__
        if f"{own}.{name}" in MODULES:
            return import_module(f"{own}.{name}")
        if name == "__all__":
            return [each for each in names_in(own) if each[0] != "_"]
        if name.startswith("__") or name not in names_in(own):
            raise _absent_attribute(own, name)
        home, there = home_of(name)
        value = getattr(import_module(home), there)
        self.__dict__[name] = value
        return value

    def __dir__(self) -> list[str]:
        return sorted({*self.__dict__, *names_in(self.__name__)})


class AliasDistribution(importlib.metadata.Distribution):
    """What `importlib.metadata` is told of PEFT; it has no files."""

    def read_text(self, filename: str | PathLike[str]) -> str | None:
        """The text of one of its two records."""
        records = {
            "METADATA": f"Metadata-Version: 2.1\nName: {STANDS_FOR}\nVersion: {VERSION}\n"
            "Summary: Multigraft under PEFT's name\n",
            "top_level.txt": f"{STANDS_FOR}\n",
        }
        return records.get(str(filename))

    def locate_file(self, path: str | PathLike[str]) -> Any:
        """Where a file of it would be; there are none."""
        return Path(__file__).parent / path


class Alias(importlib.metadata.DistributionFinder):
    """Finds PEFT's modules and metadata while it is in ``sys.meta_path``.

    It is its own context: ``with install_as_peft(): ...`` takes it out at the end.
    """

    stands_for = STANDS_FOR

    def __init__(self) -> None:
        self.undo: list[Callable[[], None]] = []
        """What else is taken back with it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A module's spec, or None for what is not PEFT's.

        Raises:
            AliasError: PEFT may have it, and it is not here.
        """
        if name.partition(".")[0] != STANDS_FOR:
            return None
        if name not in MODULES:
            raise _absent_module(name)
        # A loader by what it does, without the protocol's deprecated methods.
        return ModuleSpec(name, self, origin="multigraft.compat", is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """An empty module; its names come when they are asked for."""
        return AliasModule(spec.name, f"Multigraft under the name of {spec.name}.")

    def exec_module(self, module: ModuleType) -> None:
        """Give it what every module of PEFT's has at once."""
        module.__dict__["__version__"] = VERSION

    def find_distributions(self, context: Any = None) -> Iterable[AliasDistribution]:
        """The one distribution, if it is asked for by name or all are."""
        wanted = getattr(context, "name", None)
        found = wanted is None or str(wanted).lower() == STANDS_FOR
        return iter([AliasDistribution()] if found else [])

    def uninstall(self) -> None:
        """Let ``import peft`` mean PEFT again; what was imported meanwhile keeps our classes."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        while self.undo:
            self.undo.pop()()
        for name in [n for n, m in sys.modules.items() if isinstance(m, AliasModule)]:
            del sys.modules[name]
        importlib.invalidate_caches()

    def __enter__(self) -> Alias:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.uninstall()


def installed() -> Alias | None:
    """The alias of this process, whoever installed it."""
    # By its attribute, as `child` loads this file under a name of its own.
    found = [f for f in sys.meta_path if getattr(f, "stands_for", "") == STANDS_FOR]
    return cast(Alias, found[0]) if found else None


def install() -> Alias:
    """Put the alias first among the finders; the one that is there already stays.

    Raises:
        StateError: a package that has looked for PEFT already is imported.
    """
    alias = installed()
    if alias is None:
        _require_undecided()
        alias = Alias()
        sys.meta_path.insert(0, alias)
    return alias


def names_in(module: str) -> list[str]:
    """The names that one of PEFT's modules has here."""
    names = MODULES[module].split()
    if "*" in names:
        names.remove("*")
        names += import_module("multigraft").__all__
    return sorted({*names} - {"__version__"})


def _require_undecided() -> None:
    loaded = [name for name in DECIDED if name in sys.modules]
    if loaded:
        from multigraft.errors import StateError

        raise StateError(
            f"{', '.join(f'`{name}`' for name in loaded)} is imported already, and knows by now "
            "whether PEFT is there. Call install_as_peft() first of all, before any other import, "
            "or start the script with `python -m multigraft.compat SCRIPT`."
        )


def _absence(name: str, near: Iterator[str] | Iterable[str]) -> str:
    from multigraft.errors import did_you_mean

    leaf = name.rpartition(".")[2]
    return (
        f"`{name}` is not in Multigraft, which stands for PEFT in this process."
        f"{did_you_mean(leaf, near)} `multigraft.compat.tables` lists what is here; for anything "
        "else run without the alias, with PEFT installed."
    )


def _absent_module(name: str) -> ImportError:
    from multigraft.errors import AliasError

    parent = name.rpartition(".")[0]
    under = [m.rpartition(".")[2] for m in MODULES if m.rpartition(".")[0] == parent]
    names = names_in(parent) if parent in MODULES else []
    return AliasError(_absence(name, [*names, *under]), name=None, path=None)


def _absent_attribute(module: str, name: str) -> AttributeError:
    if name.startswith("__"):
        return AttributeError(f"module `{module}` has no attribute `{name}`")
    return AttributeError(_absence(f"{module}.{name}", names_in(module)))
