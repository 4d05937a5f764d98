"""PEFT's `peft.helpers`: small things around a model with adapters."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType, TracebackType
from typing import Any

from torch import nn

from multigraft.config import PeftConfig
from multigraft.errors import ConfigError, MultigraftError, UnsupportedError
from multigraft.graft import Graft
from multigraft.kappa import KappaTuneSelector, find_kappa_target_modules
from multigraft.layer import AdaptedLayer
from multigraft.roster import Roster
from multigraft.schedule import penalties

__all__ = [
    "DoraCaching",
    "KappaTuneSelector",
    "MontecloraTrainerMixin",
    "check_if_peft_model",
    "disable_input_dtype_casting",
    "find_kappa_target_modules",
    "rescale_adapter_scale",
    "update_forward_signature",
    "update_generate_signature",
    "update_signature",
]


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Whether a directory, or a repository on the hub, holds an adapter's config."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except (MultigraftError, OSError, ValueError):
        return False
    return True


@contextmanager
def rescale_adapter_scale(
    model: nn.Module, multiplier: float, *, adapter_names: str | Sequence[str] | None = None
) -> Iterator[None]:
    """Multiply the scaling of LoRA adapters for the length of the block.

    Every scaling is afterwards what it was, whatever happens in the block, except those that the
    block sets itself: these stay. An adapter that is added in the block keeps its own.

    Args:
        model: holds adapters, or is one adapted layer.
        multiplier: by what; 0 to 1 goes from the base to the fine-tuned model.
        adapter_names: which adapters; all by default.

    Raises:
        ConfigError: ``multiplier`` is no finite number.
        UnsupportedError: the model has no LoRA.
        StateError: one of them is merged; nothing was scaled.
        AdapterNameError: there is no such adapter.
    """
    if isinstance(multiplier, bool) or not isinstance(multiplier, (int, float)):
        raise ConfigError(f"`multiplier` (={multiplier!r}) must be a finite number.")
    layers = [m for m in model.modules() if isinstance(m, AdaptedLayer)]
    names = None
    if adapter_names is not None and layers:
        names = layers[0].roster.require(adapter_names)
    found: list[tuple[AdaptedLayer, str, Graft]] = []
    for layer in layers:
        for name, grafts in layer.grafts.items():
            loras = [g for g in grafts if g.method.prefix == "lora_" and not g.method.rides]
            if loras and (names is None or name in names):
                layer.scaling.check(name, multiplier)
                found += [(layer, name, graft) for graft in loras]
    if not found:
        raise UnsupportedError(
            f"{type(model).__name__} has no LoRA adapter"
            f"{'' if names is None else f' of {names}'} whose scaling could be changed."
        )
    before = [(graft, graft.method.scaling) for _, _, graft in found]
    for graft, scaling in before:
        graft.method.scaling = scaling * multiplier
    try:
        yield
    finally:
        for graft, scaling in before:
            if graft.method.scaling == scaling * multiplier:
                graft.method.scaling = scaling
        for layer in layers[:1]:
            layer.roster.forget_stacks()


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Kept for scripts (layer-wise casting in diffusers): inputs are never cast here.

    Factors are cast to the input's dtype, never the input to theirs, so there is nothing to switch
    off and restore.
    """
    yield


class DoraCaching:
    """Kept for scripts: the norms of DoRA are always kept, until A, B or the base change.

    A kept norm is never out of date, in training neither, so there is nothing to switch on; with
    ``enabled=False`` nothing is switched off.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def __call__(self, enabled: bool = True) -> None:
        """As in PEFT, for good rather than for a block."""
        self.enabled = enabled

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass


class MontecloraTrainerMixin:
    """Put before a `Trainer` class: adds what adapters add to the loss, whoever computes it.

    A model's own loss holds it already; a `Trainer` that computes another (label smoothing, a
    function of its own) would lose it. With this class it is added once, to either.
    """

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The task's loss plus what MonteCLoRA (and AdaLoRA) adapters add to it."""
        rosters = {id(m.roster): m.roster for m in model.modules() if isinstance(m, AdaptedLayer)}
        with _penalties_apart(list(rosters.values())):
            found = super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs=return_outputs, **kwargs
            )
        loss, *outputs = found if return_outputs else (found,)
        for roster in rosters.values():
            for term in penalties(roster):
                loss = loss + term.to(loss.device)
        return (loss, *outputs) if return_outputs else loss


@contextmanager
def _penalties_apart(rosters: Sequence[Roster]) -> Iterator[None]:
    """Let forwards leave penalties out of the losses that they give."""
    before = [roster.penalises for roster in rosters]
    for roster in rosters:
        roster.penalises = False
    try:
        yield
    finally:
        for roster, value in zip(rosters, before, strict=True):
            roster.penalises = value


def update_forward_signature(model: Any) -> None:
    """Let ``model.forward`` show the signature of the base model's; see `update_signature`."""
    _show_signature(model, "forward")


def update_generate_signature(model: Any) -> None:
    """Let ``model.generate`` show the signature of the base model's, if it has one."""
    if hasattr(model.get_base_model(), "generate"):
        _show_signature(model, "generate")


def update_signature(model: Any, method: str = "all") -> None:
    """Let a `PeftModel` show the signatures and docstrings of its base model's methods.

    They are what `inspect.signature` and `help` tell of this one model; what it does stays.

    Args:
        method: ``"forward"``, ``"generate"`` or ``"all"``.

    Raises:
        ConfigError: it is something else.
    """
    if method not in ("forward", "generate", "all"):
        raise ConfigError(f"`method` (={method!r}) must be 'forward', 'generate' or 'all'.")
    if method in ("forward", "all"):
        update_forward_signature(model)
    if method in ("generate", "all"):
        update_generate_signature(model)


def _show_signature(model: Any, name: str) -> None:
    own = getattr(model, name)
    kinds = {p.kind for p in inspect.signature(own).parameters.values() if p.default is p.empty}
    if kinds - {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        return  # it has one of its own
    # The base class's function, so that the signature still shows `self` to be bound.
    of_base: Callable[..., Any] = getattr(type(model.get_base_model()), name)
    function = getattr(type(model), name)

    def shown(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    functools.update_wrapper(shown, of_base, assigned=("__doc__", "__name__", "__annotations__"))
    setattr(model, name, MethodType(shown, model))
