"""bitsandbytes' 4-bit weights: nf4 and fp4, with or without doubly quantised statistics.

    W ≈ code[q] * absmax[block]        q: packed, two to a byte;  one absmax per `blocksize` values

The data may lie in a packing of its own for CPUs with AVX512-BF16, which the layer changes to in an
evaluation forward; it is read as it lies, written plainly, and given back as it lay.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from multigraft.storage.contract import STORAGES, Storage, refill


class Bnb4(Storage):
    """``Params4bit``: packed data and a `QuantState` that the layer and the weight share."""

    name = "bnb4"
    is_exact = False

    def refusal(self, layer: nn.Module, name: str = "weight") -> str | None:
        if _state(layer, name) is None or _weight(layer, name).is_meta:
            return (
                f"`{name}` of {type(layer).__name__} is not quantised yet: move the model to its "
                "device, or load its values, first"
            )
        return None

    def read(self, layer: nn.Module, name: str = "weight") -> Tensor:
        weight, state = _weight(layer, name), _state(layer, name)
        return weight.detach() if state is None else _dequantise(weight.data, state)

    def write(self, layer: nn.Module, value: Tensor, name: str = "weight") -> None:
        from bitsandbytes.functional import quantize_4bit

        weight, state = _weight(layer, name), _state(layer, name)
        is_packed = getattr(state, "packing_format_for_cpu", False)
        data, fresh = quantize_4bit(
            value.contiguous(),
            blocksize=state.blocksize,
            compress_statistics=state.original_nested if is_packed else state.nested,
            quant_type=state.quant_type,
            quant_storage=weight.dtype,
        )
        fresh.dtype = state.original_dtype if is_packed else state.dtype
        data = data.reshape(state.original_qshape if is_packed else weight.shape)
        _put(weight, state, data, fresh)

    def keep(self, layer: nn.Module, name: str = "weight") -> Any:
        return _weight(layer, name).data.clone(), copy.deepcopy(_state(layer, name))

    def read_kept(self, layer: nn.Module, kept: Any, name: str = "weight") -> Tensor:
        data, state = kept
        device = _weight(layer, name).device
        if data.device != device:
            state = copy.deepcopy(state)
            state.to(device)
        return _dequantise(data.to(device), state)

    def give_back(self, layer: nn.Module, kept: Any, name: str = "weight") -> None:
        _put(_weight(layer, name), _state(layer, name), *kept)

    def shape(self, layer: nn.Module, name: str = "weight") -> tuple[int, ...]:
        return tuple((_state(layer, name) or _weight(layer, name)).shape)

    def make_differentiable(self, layer: nn.Module, name: str = "weight") -> None:
        # The packing of an evaluation has no backward: bitsandbytes would raise, or, without a
        # bias, pass no gradient on.
        weight, state = _weight(layer, name), _state(layer, name)
        if getattr(state, "packing_format_for_cpu", False):
            _put(weight, state, *_unpacked(weight.data, state))

    def compute_dtype(self, layer: nn.Module) -> torch.dtype | None:
        return getattr(layer, "compute_dtype", None)


def _weight(layer: nn.Module, name: str) -> Any:
    return layer._parameters[name]


def _state(layer: nn.Module, name: str) -> Any:
    """The weight's, or the layer's own where sharding has rebuilt the weight without it."""
    return getattr(_weight(layer, name), "quant_state", None) or getattr(layer, "quant_state", None)


def _put(weight: Any, state: Any, data: Tensor, fresh: Any) -> None:
    weight.data = refill(weight.data, data)
    _refill_state(state, fresh)


def _refill_state(old: Any, new: Any) -> None:
    """Make one `QuantState` equal to another, nested one included, keeping the objects."""
    for name in vars(old).keys() - vars(new).keys():
        delattr(old, name)
    for name, value in vars(new).items():
        present = vars(old).get(name)
        if isinstance(value, Tensor):
            value = refill(present, value)
        elif name == "state2" and value is not None:
            if present is not None:
                _refill_state(present, value)
                continue
            value = copy.deepcopy(value)
        setattr(old, name, value)


def _dequantise(data: Tensor, state: Any) -> Tensor:
    from bitsandbytes import functional

    if getattr(state, "packing_format_for_cpu", False):
        data, state = _unpacked(data, state)
    return functional.dequantize_4bit(data, state)


def _unpacked(data: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Plain data and statistics for those of the CPU's packing; exact, and left alone.

    bitsandbytes' own inverse keeps the statistics transposed, or quantises them anew.
    """
    from bitsandbytes import functional

    twin = copy.copy(state)
    twin.original_nested = False
    data, _ = functional._convert_weight_packed_for_cpu_inverse(data, twin)
    absmax = state.absmax.T.reshape(-1).float()
    rest = (state.shape, state.code, state.blocksize, state.quant_type, state.original_dtype)
    return data, functional.QuantState(absmax, *rest)


STORAGES.register("bitsandbytes.nn.modules.Params4bit")(Bnb4())
