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

from multigraft import kernels
from multigraft.errors import UnsupportedError
from multigraft.graft import Graft
from multigraft.methods import Method
from multigraft.methods.contract import Params


def touched(graft: Graft) -> list[str]:
    """The base tensors that a graft changes, by name in the state dict of the wrapped module.

    Not a weight where it is tied, which is changed at the other site.
    """
    site = graft.site
    if graft.method.kind == "replace":
        return [site.key_of(name) for name in graft.owners if graft.owns(name)]
    if graft.tied is not None:
        return []
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


def effective(name: str, grafts: Sequence[Graft], value: Tensor, training: bool = False) -> Tensor:
    """The tensor ``name`` with these grafts in it; gradients flow to them, and to ``value``.

    Args:
        value: what the base holds there now, what is merged included; dense, in its own layout.
        training: with dropout.

    Returns:
        A tensor of ``value``'s shape and dtype.
    """
    dtype = value.dtype
    # 8-bit floats are stored and never computed in; maps are, in no less than float32.
    is_mapped = any(graft.method.kind == "map" for graft in grafts)
    if dtype.itemsize == 1 or (is_mapped and dtype.itemsize < 4):
        value = value.float()
    # Autocast would round ΔW, and give a tensor of another dtype than the parameter's.
    with kernels.without_autocast(value):
        for graft in grafts:
            if graft.method.kind == "replace":
                value = graft.params[name.removeprefix(graft.site.key_of(""))]
        value = mapped(grafts, name, value)
        for graft in grafts:
            if graft.method.kind == "additive":
                value = _added(graft, name, value, training)
    return _narrowed(value, dtype)


def held(layer: nn.Module, name: str) -> Any:
    """What a module holds under this name, or a module inside it."""
    path, _, leaf = name.rpartition(".")
    return getattr(layer.get_submodule(path), leaf)


def mapped(grafts: Sequence[Graft], name: str, value: Tensor) -> Tensor:
    """A weight or bias with the linear maps of its layer's input and output folded in."""
    maps = [graft for graft in grafts if graft.method.kind == "map"]
    # W' = O_b O_a W I_b I_a for x that goes through I_a first: the last input map is folded first.
    for graft in reversed(maps):
        value = _input_folded(graft, name, value)
    for graft in maps:
        value = _output_folded(graft, name, value)
    return value.contiguous() if maps else value


def _input_folded(graft: Graft, name: str, value: Tensor) -> Tensor:
    method, geometry = graft.method, graft.site.geometry
    if name != graft.site.key or type(method).input is Method.input:
        return value
    assert geometry is not None
    params = in_dtype(value.dtype, graft.params)
    return geometry.fold_input(graft.site.layer, value, lambda x: method.input(params, x))


def _output_folded(graft: Graft, name: str, value: Tensor) -> Tensor:
    method, geometry = graft.method, graft.site.geometry
    if type(method).output is Method.output:
        return value
    assert geometry is not None
    params = in_dtype(value.dtype, graft.params)
    if name != graft.site.key:
        return method.output(params, method.as_output_bias(value)).reshape(value.shape)
    return geometry.fold_output(graft.site.layer, value, lambda y: method.output(params, y))


def in_dtype(dtype: torch.dtype, params: Params) -> dict[str, Tensor]:
    """An adapter's tensors in this dtype; indices stay what they are."""
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in params.items()}


def _added(graft: Graft, name: str, value: Tensor, training: bool) -> Tensor:
    method, params = graft.method, graft.params
    if training:
        params = method.thinned(params)
    if name != graft.site.key:
        bias = method.delta_bias(params)
        return value if bias is None else value + bias.to(value.dtype)
    return method.add_delta(params, value, graft.site.weight() if method.needs_weight else None)


def _narrowed(value: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype.itemsize == 1:  # casting to an 8-bit float does not saturate
        limit = torch.finfo(dtype).max
        value = value.clamp(-limit, limit)
    return value.to(dtype)
