"""Independent checkers of the laws: they walk modules themselves and ask the library nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from multigraft import AdaptedLayer

TORCH_OWN = frozenset(vars(nn.Module()))
"""Leaves make these when they are first asked for; what hook tables hold is compared apart."""


@dataclass(frozen=True)
class Fingerprint:
    """What must come back after removal.

    Args:
        modules: (path, identity, type, training, names of instance attributes besides those that
            torch gives every module, numbers of hooks), in order; a shared module once per path.
        tensors: (path, identity, bits, requires_grad), in order.
    """

    modules: tuple[tuple[str, int, type, bool, tuple[str, ...]], ...]
    tensors: tuple[tuple[str, int, bytes, bool], ...]

    @property
    def bits(self) -> dict[str, bytes]:
        """Bits by path."""
        return {path: bits for path, _, bits, _ in self.tensors}


def fingerprint(model: nn.Module) -> Fingerprint:
    """Object graph, order of children, bits and flags of a model."""
    modules = [
        (path, id(m), type(m), m.training, (*sorted({*vars(m)} - TORCH_OWN), *_hooks(m)))
        for path, m in model.named_modules(remove_duplicate=False)
    ]
    tensors = [
        (path, id(tensor), bits_of(tensor), tensor.requires_grad)
        for path, tensor in (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        )
    ]
    return Fingerprint(tuple(modules), tuple(tensors))


def bits_of(tensor: Tensor) -> bytes:
    """The tensor's own bytes, so that NaN equals itself and 0.0 differs from -0.0.

    Those of a quantised tensor include the statistics that it is read with.
    """
    if hasattr(tensor, "__tensor_flatten__"):
        parts, _ = tensor.__tensor_flatten__()
        return b"".join(bits_of(getattr(tensor, part)) for part in parts)
    own = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return own + b"".join(bits_of(part) for part in _statistics(tensor))


def assert_side_by_side(model: nn.Module, pristine: nn.Module) -> None:
    """No graft on a graft, and every adapted layer stands at its base path.

    Args:
        model: the base model with its adapters in it (not the handle).
        pristine: a copy of it that was never adapted.
    """
    for place, layer in _layers(model):
        inside = [
            p for p, m in layer.named_modules() if isinstance(m, AdaptedLayer) and m is not layer
        ]
        assert not inside, f"{place} holds adapted layers inside: {inside}"
        base = layer.base_layer
        assert not isinstance(base, AdaptedLayer), f"{place}: base_layer is an adapted layer"
        assert "base_layer" not in place.split("."), f"{place} hangs below a wrapper"
        theirs = dict(pristine.named_modules(remove_duplicate=False))
        assert layer.path in theirs, f"{layer.path} is no path of the base model"
        assert type(theirs[layer.path]) is type(base), f"{layer.path} wraps a {type(base)}"
        same = [p for p, m in theirs.items() if m is theirs[layer.path]]
        assert place in same, f"{layer.path} stands at {place}"


def adapted_paths(model: nn.Module) -> list[str]:
    """Where adapted layers stand, sorted; a shared one at each of its places."""
    return sorted(place for place, _ in _layers(model))


def _layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    for place, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, AdaptedLayer):
            yield place, module


def _statistics(tensor: object) -> Iterator[Tensor]:
    """What bitsandbytes keeps beside 4-bit data: block scales, perhaps quantised themselves."""
    held = getattr(tensor, "__dict__", {})
    for name in ("absmax", "code", "offset"):
        if isinstance(held.get(name), Tensor):
            yield held[name]
    for name in ("quant_state", "state2"):
        if held.get(name) is not None:
            yield from _statistics(held[name])


def _attributes(module: nn.Module) -> list[str]:
    """Without tables of hooks: some are made when first asked for, and `_hooks` counts them."""
    return sorted(name for name in vars(module) if not name.endswith("_hooks"))


def _hooks(module: nn.Module) -> list[str]:
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [f"{name}={len(getattr(module, name))}" for name in tables]
