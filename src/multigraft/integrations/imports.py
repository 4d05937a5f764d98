"""Do something with a module as soon as it is imported, by whomever."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Action = Callable[[ModuleType], None]


class ImportWatch:
    """Runs an action on each named module, now where it is loaded, else right after its import.

    It looks modules up as the interpreter does, and stands in `sys.meta_path` only while one of
    them has not been imported yet.
    """

    def __init__(self, names: Sequence[str], action: Action) -> None:
        self.action = action
        self.awaited: set[str] = set()
        for name in names:
            if name in sys.modules:
                action(sys.modules[name])
            else:
                self.awaited.add(name)
        if self.awaited:
            sys.meta_path.insert(0, self)

    def stop(self) -> None:
        """Wait no longer."""
        self.awaited.clear()
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders give, whose loader runs the action at its end."""
        if name not in self.awaited:
            return None
        others = (finder for finder in list(sys.meta_path) if finder is not self)
        finds = (getattr(finder, "find_spec", None) for finder in others)
        spec = next((s for f in finds if f and (s := f(name, path, target)) is not None), None)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            self._extend(spec.loader)
        return spec

    def _extend(self, loader: Any) -> None:
        """Let this one loader run the action once it has run the module."""
        own = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            loader.__dict__.pop("exec_module", None)
            own(module)
            if module.__name__ in self.awaited:
                self.awaited.discard(module.__name__)
                self.action(module)
            if not self.awaited:
                self.stop()

        loader.exec_module = exec_module
