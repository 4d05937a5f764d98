"""bitsandbytes' 8-bit weights (``Linear8bitLt``), as LLM.int8() stores them.

W ≈ CB * SCB / 127        CB: int8 (out, in)   SCB: largest magnitude of each row (out,)

Paper: Dettmers et al. 2022, arXiv:2208.07339.
Departs: rounds from float32, where bitsandbytes' own quantisation goes through float16 first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from multigraft.storage.contract import STORAGES, Storage, refill


class Bnb8(Storage):
    """``Int8Params``; the row scales lie on the weight, after a forward on the layer's state."""

    name = "bnb8"
    is_exact = False

    def refusal(self, layer: nn.Module, name: str = "weight") -> str | None:
        weight = _weight(layer, name)
        if weight.has_fp16_weights:
            return (
                f"`{name}` of {type(layer).__name__} is quantised anew in every forward; build the "
                "layer with `has_fp16_weights=False`"
            )
        if weight.is_meta or weight.dtype != torch.int8 or _owner(layer, name).SCB is None:
            return (
                f"`{name}` of {type(layer).__name__} is not quantised yet: move the model to its "
                "device, or load its values, first"
            )
        return None

    def read(self, layer: nn.Module, name: str = "weight") -> Tensor:
        weight = _weight(layer, name)
        if weight.dtype != torch.int8:
            return weight.detach()
        return _dequantise(weight.data, _owner(layer, name).SCB)

    def write(self, layer: nn.Module, value: Tensor, name: str = "weight") -> None:
        SCB = value.abs().amax(dim=1)
        CB = (value * (127.0 / SCB.clamp(min=1e-30))[:, None]).round()
        self.give_back(layer, (CB.clamp(-127, 127).to(torch.int8), SCB), name)

    def keep(self, layer: nn.Module, name: str = "weight") -> Any:
        return _weight(layer, name).data.clone(), _owner(layer, name).SCB.clone()

    def read_kept(self, layer: nn.Module, kept: Any, name: str = "weight") -> Tensor:
        CB, SCB = (tensor.to(_weight(layer, name).device) for tensor in kept)
        return _dequantise(CB, SCB)

    def give_back(self, layer: nn.Module, kept: Any, name: str = "weight") -> None:
        weight, owner = _weight(layer, name), _owner(layer, name)
        CB, SCB = kept
        # In place: the layer's `state.CB` and the weight's data are one memory, until the model
        # moves; then bitsandbytes leaves the state where it was.
        weight.data = refill(weight.data, CB)
        owner.SCB = refill(owner.SCB, SCB.to(owner.SCB.dtype))
        if owner.CB is not None:
            is_beside = owner.CB.device == weight.device
            owner.CB = weight.data if is_beside else refill(owner.CB, CB)


def _weight(layer: nn.Module, name: str) -> Any:
    return layer._parameters[name]


def _owner(layer: nn.Module, name: str) -> Any:
    """What holds the row scales now: the weight at first, the layer's state later."""
    weight = _weight(layer, name)
    state = getattr(layer, "state", None)
    return weight if weight.SCB is not None or state is None else state


def _dequantise(CB: Tensor, SCB: Tensor) -> Tensor:
    return CB.float() * (SCB.to(CB.device).float() / 127.0)[:, None]


STORAGES.register("bitsandbytes.nn.modules.Int8Params")(Bnb8())
