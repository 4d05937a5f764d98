"""Plain tensors: float64, float32, bfloat16, float16, and the 8-bit floats; buffers of any dtype.

8-bit floats are stored and never computed in: they read as float32, and adapters take that dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from multigraft.storage.contract import STORAGES, Storage
from multigraft.whole import is_kept_by_deepspeed

NARROW = frozenset({torch.float16, torch.float8_e4m3fn, torch.float8_e5m2})
"""Dtypes that a merged weight could leave; bfloat16 has float32's range."""


class Dense(Storage):
    """A floating-point parameter that is exactly what it looks like."""

    name = "dense"

    def refusal(self, layer: nn.Module, name: str = "weight") -> str | None:
        if name in layer._buffers:
            return None
        if name not in layer._parameters:
            return (
                f"`{name}` of {type(layer).__name__} is not a plain parameter but computed from "
                "others (pruning, a custom hook), so what is written there would be lost; make it "
                "plain first, or keep the adapter"
            )
        parameter = layer._parameters[name]
        if parameter is None or not parameter.is_floating_point():
            return f"`{name}` of {type(layer).__name__} is not a floating-point tensor"
        if parameter.is_meta:
            return f"`{name}` of {type(layer).__name__} is on the meta device: it holds no values"
        return None

    def copy_refusal(self, layer: nn.Module) -> str | None:
        if any(map(is_kept_by_deepspeed, layer.parameters())):
            return (
                "is one of DeepSpeed's (ZeRO-3), of which each process has a part; attach the "
                "adapter before the model is partitioned, or adapt it with `target_modules`"
            )
        narrow = [t.dtype for t in layer.parameters() if t.dtype.itemsize == 1]
        if not narrow:
            return None
        return (
            f"is stored in {narrow[0]}, which nothing can be trained in; leave this module in a "
            "wider dtype, or adapt it with `target_modules`"
        )

    def read(self, layer: nn.Module, name: str = "weight") -> Tensor:
        # Through the attribute, so that a parametrised weight reads as what the forward uses.
        tensor: Tensor = getattr(layer, name)
        return _computable(tensor.detach())

    def write(self, layer: nn.Module, value: Tensor, name: str = "weight") -> None:
        tensor = _tensor(layer, name)
        with torch.no_grad():
            if tensor.dtype in NARROW:
                limit = torch.finfo(tensor.dtype).max
                largest = float(value.abs().amax()) if value.numel() else 0.0
                if largest > limit:
                    raise ValueError(
                        f"`{name}` would hold {largest:.3g}, and {tensor.dtype} ends at "
                        f"{limit:.3g}; convert the base to bfloat16 or float32 first"
                    )
            tensor.copy_(value)

    def in_place(self, layer: nn.Module, name: str = "weight") -> Tensor | None:
        tensor = _tensor(layer, name).detach()
        # Narrow ones are checked as a whole first; a subclass may store something else than values.
        is_plain = type(tensor) is Tensor and tensor.dtype in (torch.bfloat16, torch.float32)
        return tensor if is_plain and type(self).write is Dense.write else None

    def keep(self, layer: nn.Module, name: str = "weight") -> Any:
        return _tensor(layer, name).detach().clone()

    def read_kept(self, layer: nn.Module, kept: Any, name: str = "weight") -> Tensor:
        tensor: Tensor = kept
        return _computable(tensor.to(_tensor(layer, name).device))

    def give_back(self, layer: nn.Module, kept: Any, name: str = "weight") -> None:
        # The model may have moved since; in place, so that addresses held elsewhere stay good.
        with torch.no_grad():
            _tensor(layer, name).copy_(kept)

    def compute_dtype(self, layer: nn.Module) -> torch.dtype | None:
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            return None
        return weight.dtype if weight.dtype.itemsize > 1 else None


DENSE = Dense()
STORAGES.register(nn.Parameter, Tensor)(DENSE)


def _computable(tensor: Tensor) -> Tensor:
    is_narrow = tensor.is_floating_point() and tensor.dtype.itemsize == 1
    return tensor.float() if is_narrow else tensor


def _tensor(layer: nn.Module, name: str) -> Tensor:
    """The parameter or buffer itself."""
    tensor: Tensor | None = layer._parameters.get(name)
    if tensor is None:
        tensor = layer._buffers[name]
    assert tensor is not None, "asked `refusal` first"
    return tensor
