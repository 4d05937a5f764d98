"""`DTensor`: each process holds a part of the weight (FSDP2, tensor parallelism).

Reading puts the weight together for as long as it is needed; writing keeps this process's part of
what is written. All processes must do either in the same order, as merging does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from multigraft.storage.contract import STORAGES, Storage
from multigraft.whole import fill, whole


class Sharded(Storage):
    """A floating-point parameter that lies in parts on several processes."""

    name = "sharded"

    def refusal(self, layer: nn.Module, name: str = "weight") -> str | None:
        tensor = _tensor(layer, name)
        if not tensor.is_floating_point():
            return f"`{name}` of {type(layer).__name__} is not a floating-point tensor"
        if tensor.is_meta:
            return f"`{name}` of {type(layer).__name__} is on the meta device: it holds no values"
        return None

    def copy_refusal(self, layer: nn.Module) -> str | None:
        return (
            "lies in parts on several processes; attach the adapter before the model is sharded, "
            "or adapt this module with `target_modules`"
        )

    def read(self, layer: nn.Module, name: str = "weight") -> Tensor:
        return whole(_tensor(layer, name).detach())

    def write(self, layer: nn.Module, value: Tensor, name: str = "weight") -> None:
        # The values are the same on all processes: nothing is sent.
        fill(_tensor(layer, name), value)

    def keep(self, layer: nn.Module, name: str = "weight") -> Any:
        return _tensor(layer, name).detach().clone()

    def read_kept(self, layer: nn.Module, kept: Any, name: str = "weight") -> Tensor:
        joined: Tensor = whole(kept)
        return joined

    def give_back(self, layer: nn.Module, kept: Any, name: str = "weight") -> None:
        own: Any = _tensor(layer, name)
        with torch.no_grad():
            own.to_local().copy_(kept.to_local())

    def compute_dtype(self, layer: nn.Module) -> torch.dtype | None:
        weight = layer._parameters.get("weight")
        if weight is None or not weight.is_floating_point():
            return None
        return weight.dtype if weight.dtype.itemsize > 1 else None


SHARDED = Sharded()
STORAGES.register("torch.distributed.tensor.DTensor", "torch.distributed.tensor._api.DTensor")(
    SHARDED
)


def _tensor(layer: nn.Module, name: str) -> Tensor:
    tensor = layer._parameters.get(name)
    assert tensor is not None, "this storage was found by the tensor's type"
    return tensor
