"""The base model's own tensors under the names that they have without adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from multigraft.errors import CheckpointError, StateError, listed
from multigraft.layer import AdaptedLayer
from multigraft.tuner import base_of


class BaseKeys(NamedTuple):
    """What `set_base_model_state_dict` found, as torch names it."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The base model's state dict as it would be without adapters: its names, none of theirs.

    What is merged is in the tensors.

    Args:
        model: a `PeftModel`, or a model adapted in place.
    """
    base = base_of(model)
    state, names = base.state_dict(), names_of_base(base)
    return {name: state[key] for name, key in names.items()}


def set_base_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True
) -> BaseKeys:
    """Give the base model's tensors these values; the adapters stay as they are.

    Args:
        state_dict: by name without adapters.
        strict: fail on names that are missing or unknown.

    Raises:
        CheckpointError: names or shapes do not fit; nothing was changed.
        StateError: an adapter is merged, so its change would be lost.
    """
    base = base_of(model)
    layers = [m for m in base.modules() if isinstance(m, AdaptedLayer)]
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    if merged:
        raise StateError(
            f"adapters {merged} are merged into the base, whose tensors cannot be replaced now. "
            "Call unmerge_adapter() first."
        )
    names, own = names_of_base(base), base.state_dict()
    report = BaseKeys(
        [name for name in names if name not in state_dict],
        [name for name in state_dict if name not in names],
    )
    wrong = []
    if strict and report.missing_keys:
        wrong.append(f"it lacks {listed(report.missing_keys)}")
    if strict and report.unexpected_keys:
        wrong.append(f"the base has no {listed(report.unexpected_keys)}")
    found = {names[name]: value for name, value in state_dict.items() if name in names}
    misshapen = [key for key, value in found.items() if value.shape != own[key].shape]
    if misshapen:
        wrong.append(f"of another shape are {listed(misshapen)}")
    if wrong:
        raise CheckpointError(
            f"the state dict does not fit {type(base).__name__}: {'; '.join(wrong)}. Nothing was "
            "changed."
        )
    base.load_state_dict(found, strict=False)
    return report


def names_of_base(base: nn.Module) -> dict[str, str]:
    """The base's own keys, in order, to those of its state dict now."""
    modules = base.named_modules(remove_duplicate=False)
    wrapped = {path for path, module in modules if isinstance(module, AdaptedLayer)}
    names = {}
    for key in base.state_dict():
        parts = key.split(".")
        paths = (".".join(parts[:index]) for index in range(1, len(parts)))
        host = next((path for path in paths if path in wrapped), None)
        start = f"{host}.base_layer."
        if host is None:
            names[key] = key
        elif key.startswith(start):
            names[f"{host}.{key.removeprefix(start)}"] = key
    return names
