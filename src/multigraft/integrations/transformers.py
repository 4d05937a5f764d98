"""transformers' `Trainer` and our models.

The trainer knows adapted models by class alone, and has no place to register one: its modules
compare with the `PeftModel` that they imported, or take it that there is none. Registering tells
these modules, and no other, of our class beside PEFT's. It also gives the trainer a way to load
checkpoints of models that were adapted in place, for which it has none.

It happens once, when the first model is adapted, to the modules that are loaded, and to the others
when they are imported; never at ``import multigraft``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from multigraft.integrations.imports import ImportWatch

MODULES = ("transformers.trainer_utils", "transformers.trainer")
"""Where the trainer asks whether a model is adapted; in transformers 5.0 the second alone."""

_CLASSES = ("PeftModel", "PeftMixedModel")


class _Registration:
    """What was changed in which module, and how to change it back."""

    def __init__(self) -> None:
        self.undo: list[Callable[[], None]] = []
        self.watch = ImportWatch(MODULES, self._teach)

    def withdraw(self) -> None:
        """Put every module back as it was."""
        self.watch.stop()
        while self.undo:
            self.undo.pop()()

    def _teach(self, module: ModuleType) -> None:
        if "is_peft_available" in vars(module):
            self._introduce(module)
        if "Trainer" in vars(module):
            for method in ("_load_from_checkpoint", "_load_best_model"):
                original = vars(module.Trainer).get(method)
                if original is not None:
                    self._set(module.Trainer, method, _LOADERS[method](original))

    def _introduce(self, module: ModuleType) -> None:
        """Let the module's checks know our class, beside what they know."""
        from multigraft.model import PeftModel

        has_peft = module.is_peft_available()
        for name in _CLASSES:
            known = (vars(module)[name],) if has_peft and name in vars(module) else ()
            self._set(module, name, (*known, PeftModel))
        self._set(module, "is_peft_available", _yes)

    def _set(self, owner: Any, name: str, value: Any) -> None:
        absent = object()
        before = vars(owner).get(name, absent)

        def put_back() -> None:
            if vars(owner).get(name) is not value:
                return  # somebody has put something else there since
            if before is absent:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

        setattr(owner, name, value)
        self.undo.append(put_back)


_current: _Registration | None = None
_is_wanted = True


def on_adapted() -> None:
    """Register, unless that is done or was undone by the user."""
    if _is_wanted and _current is None:
        register()


def register() -> None:
    """Let transformers' trainer know our models; adapting the first one does this itself."""
    global _current, _is_wanted
    _is_wanted = True
    if _current is None:
        _current = _Registration()


def unregister() -> None:
    """Undo `register`: the trainer is as it was, until `register` is called again."""
    global _current, _is_wanted
    _is_wanted = False
    if _current is not None:
        _current.withdraw()
        _current = None


def is_registered() -> bool:
    """Whether the trainer knows our models, or will once it is imported."""
    return _current is not None


def _yes() -> bool:
    return True


def _resuming(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load(self: Any, resume_from_checkpoint: str, model: Any = None) -> Any:
        chosen = self.model if model is None else model
        if not _restored(self, chosen, resume_from_checkpoint):
            return original(self, resume_from_checkpoint, model)

    return load


def _best(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load(self: Any) -> Any:
        if not _restored(self, self.model, self.state.best_model_checkpoint):
            return original(self)

    return load


_LOADERS = {"_load_from_checkpoint": _resuming, "_load_best_model": _best}


def _restored(trainer: Any, model: Any, folder: str) -> bool:
    """Load a checkpoint's adapters into one of our models; False where the trainer must do it."""
    from multigraft.integrations.restore import restore

    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return False  # the engine has files of its own
    return restore(getattr(model, "_orig_mod", model), folder)
