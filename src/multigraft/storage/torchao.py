"""torchao's weight tensor subclasses that can be quantised again from what they hold.

    W ≈ (qdata - zero_point) * scale        one scale (and zero point) per block

The subclass knows how to dequantise; its inner tensors are written in place, so that the parameter
stays the same object. Other subclasses (packed 4-bit layouts) are not written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from multigraft.storage.contract import STORAGES, Storage

WRITTEN = frozenset({"qdata", "scale", "zero_point"})
"""Inner tensors that follow from the weight's values; others come from a calibration."""


class TorchAO(Storage):
    """int8, float8 and intx weight-only tensors, per tensor, row or group."""

    name = "torchao"
    is_exact = False

    def refusal(self, layer: nn.Module, name: str = "weight") -> str | None:
        weight = _weight(layer, name)
        kind = type(weight).__name__
        if kind not in REQUANTISE or not WRITTEN.issuperset(_inner(weight)):
            able = ", ".join(REQUANTISE)
            return (
                f"`{name}` is a torchao {kind}, whose values cannot be quantised again from what "
                f"it holds (known are: {able}); keep the adapter, or merge into the base before "
                "quantising it"
            )
        return None

    def read(self, layer: nn.Module, name: str = "weight") -> Tensor:
        return _weight(layer, name).detach().dequantize()

    def write(self, layer: nn.Module, value: Tensor, name: str = "weight") -> None:
        weight = _weight(layer, name)
        fresh = _inner(REQUANTISE[type(weight).__name__](weight, value))
        self.give_back(layer, fresh, name)

    def keep(self, layer: nn.Module, name: str = "weight") -> Any:
        return {part: tensor.clone() for part, tensor in _inner(_weight(layer, name)).items()}

    def read_kept(self, layer: nn.Module, kept: Any, name: str = "weight") -> Tensor:
        weight = _weight(layer, name)
        _, context = weight.__tensor_flatten__()
        parts = {part: tensor.to(weight.device) for part, tensor in kept.items()}
        twin = type(weight).__tensor_unflatten__(parts, context, weight.shape, weight.stride())
        return twin.dequantize()

    def give_back(self, layer: nn.Module, kept: Any, name: str = "weight") -> None:
        inner = _inner(_weight(layer, name))
        with torch.no_grad():
            for part, tensor in kept.items():
                inner[part].copy_(tensor)

    def compute_dtype(self, layer: nn.Module) -> torch.dtype | None:
        return _weight(layer, "weight").dtype


def _weight(layer: nn.Module, name: str) -> Any:
    return layer._parameters[name]


def _inner(weight: Any) -> dict[str, Tensor]:
    names, _ = weight.__tensor_flatten__()
    return {part: getattr(weight, part) for part in names}


def _int8(weight: Any, value: Tensor) -> Any:
    return type(weight).from_hp(
        value, _granularity(weight), _mapping(weight), reduce_range=weight.reduce_range
    )


def _float8(weight: Any, value: Tensor) -> Any:
    kinds = {"float8_dtype": weight.qdata.dtype, "kernel_preference": weight.kernel_preference}
    return type(weight).from_hp(value, granularity=_granularity(weight), **kinds)


def _intx(weight: Any, value: Tensor) -> Any:
    # Its scales have the weight's dtype, so rounding to that first keeps them and `qdata` in step.
    value = value.to(weight.dtype)
    return type(weight).from_hp(
        value, weight.block_size, weight.target_dtype, mapping_type=_mapping(weight)
    )


REQUANTISE: dict[str, Callable[[Any, Tensor], Any]] = {
    "Float8Tensor": _float8,
    "Int8Tensor": _int8,
    "IntxUnpackedToInt8Tensor": _intx,
}


def _granularity(weight: Any) -> Any:
    from torchao.quantization import PerGroup, PerRow, PerTensor

    block, shape = tuple(weight.block_size), tuple(weight.shape)
    if block == shape:
        return PerTensor()
    return PerRow() if block[-1] == shape[-1] else PerGroup(block[-1])


def _mapping(weight: Any) -> Any:
    from torchao.quantization import MappingType

    zero = weight.zero_point
    is_centred = zero is None or not bool(zero.any())
    return MappingType.SYMMETRIC if is_centred else MappingType.ASYMMETRIC


STORAGES.register("torchao.utils.TorchAOBaseTensor")(TorchAO())
