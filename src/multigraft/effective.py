"""A base tensor as it is with adapters in it, for whoever reads tensors instead of running layers.

    W' = stand-in or W,  mapped by the maps,  + Σ ΔW        each relative to the base's own W

Merging writes W'; a layer whose own forward reads the tensor (fused experts, an attention's
projections) runs with W' in its place; a parent that may read a child's tensors (the fast path of
`nn.TransformerEncoderLayer`) is shown W'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from multigraft.errors import UnsupportedError
from multigraft.graft import Graft
from multigraft.methods import Method
from multigraft.methods.contract import Params


def touched(graft: Graft) -> list[str]:
    """The base tensors that a graft changes, by name in the state dict of the wrapped module.

    None where it is tied: the weight that it shares is changed at the other site.
    """
    site = graft.site
    if graft.tied is not None:
        return []
    if graft.method.kind == "replace":
        return [site.key_of(name) for name in graft.owners]
    return [site.key, site.key_of("bias")] if changes_bias(graft) else [site.key]


def changes_bias(graft: Graft) -> bool:
    """Whether a graft changes its layer's bias beside the weight.

    Raises:
        UnsupportedError: it would, and the layer has none.
    """
    has_bias = getattr(graft.site.layer, "bias", None) is not None
    if graft.method.kind == "map":
        return has_bias and type(graft.method).output is not Method.output
    if graft.site.parameter is not None or graft.method.delta_bias(graft.params) is None:
        return False
    if not has_bias:
        raise UnsupportedError(
            f"{graft.site.path}: `{graft.adapter}` has a bias (`lora_bias`) and the base layer has "
            "none to merge it into. Keep it as an adapter."
        )
    return True


def effective(name: str, grafts: Sequence[Graft], value: Tensor) -> Tensor:
    """The tensor ``name`` with these grafts in it; gradients flow to them, and to ``value``.

    Args:
        value: what the base holds there now, what is merged included; dense, in its own layout.

    Returns:
        A tensor of ``value``'s shape and dtype.
    """
    dtype = value.dtype
    if dtype.itemsize == 1:  # 8-bit floats are stored and never computed in
        value = value.float()
    # Autocast would round ΔW, and give a tensor of another dtype than the parameter's.
    with torch.autocast(value.device.type, enabled=False):
        for graft in grafts:
            if graft.method.kind == "replace":
                value = graft.params[name.removeprefix(graft.site.key_of(""))]
        for graft in grafts:
            if graft.method.kind == "map":
                value = mapped(graft, name, value)
        for graft in grafts:
            if graft.method.kind == "additive":
                value = _added(graft, name, value)
    return _narrowed(value, dtype)


def held(layer: nn.Module, name: str) -> Any:
    """What a module holds under this name, or a module inside it."""
    path, _, leaf = name.rpartition(".")
    return getattr(layer.get_submodule(path), leaf)


def mapped(graft: Graft, name: str, value: Tensor) -> Tensor:
    """A weight or bias with a linear map of the layer's input or output folded in."""
    method, geometry, layer = graft.method, graft.site.geometry, graft.site.layer
    assert geometry is not None
    params = in_dtype(value.dtype, graft.params)
    if name != graft.site.key:
        return method.output(params, method.as_output_bias(value)).reshape(value.shape)
    value = geometry.fold_input(layer, value, lambda x: method.input(params, x))
    value = geometry.fold_output(layer, value, lambda y: method.output(params, y))
    return value.contiguous()


def in_dtype(dtype: torch.dtype, params: Params) -> dict[str, Tensor]:
    """An adapter's tensors in this dtype; indices stay what they are."""
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in params.items()}


def _added(graft: Graft, name: str, value: Tensor) -> Tensor:
    method, params = graft.method, graft.params
    if name != graft.site.key:
        bias = method.delta_bias(params)
        return value if bias is None else value + bias.to(value.dtype)
    return method.add_delta(params, value, graft.site.weight() if method.needs_weight else None)


def _narrowed(value: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype.itemsize == 1:  # casting to an 8-bit float does not saturate
        limit = torch.finfo(dtype).max
        value = value.clamp(-limit, limit)
    return value.to(dtype)
