"""Weights that a forward hook computes: the old ``torch.nn.utils.weight_norm``, ``spectral_norm``.

W = g v / ‖v‖        written as  v = W, g = ‖W‖        g: `weight_g`   v: `weight_v`

The attribute ``weight`` is a temporary that the hook replaces before each forward, so writing there
would do nothing. spectral_norm holds W to a constraint that a merged weight breaks: it is refused.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from multigraft.storage.contract import STORAGES, Storage, holder


class Hooked(Storage):
    """A weight that is an attribute, not a parameter."""

    def copy_refusal(self, layer: nn.Module) -> str | None:
        return (
            f"computes its weight in a hook ({self.name}), which torch cannot copy; use "
            f"torch.nn.utils.parametrizations.{self.name} in its place"
        )


class WeightNormHook(Hooked):
    """``weight_g`` and ``weight_v`` are what is stored."""

    name = "weight_norm"

    def read(self, layer: nn.Module, name: str = "weight") -> Tensor:
        with torch.no_grad():
            return cast(Tensor, holder(layer, name).compute_weight(layer))

    def write(self, layer: nn.Module, value: Tensor, name: str = "weight") -> None:
        dim = holder(layer, name).dim
        self.give_back(layer, (torch.norm_except_dim(value, 2, dim), value), name)

    def keep(self, layer: nn.Module, name: str = "weight") -> Any:
        g, v = _parts(layer, name)
        return g.detach().clone(), v.detach().clone()

    def read_kept(self, layer: nn.Module, kept: Any, name: str = "weight") -> Tensor:
        g, v = (
            tensor.to(part.device) for tensor, part in zip(kept, _parts(layer, name), strict=True)
        )
        return torch._weight_norm(v, g, holder(layer, name).dim)

    def give_back(self, layer: nn.Module, kept: Any, name: str = "weight") -> None:
        with torch.no_grad():
            for part, tensor in zip(_parts(layer, name), kept, strict=True):
                part.copy_(tensor)
            setattr(layer, name, holder(layer, name).compute_weight(layer))

    def compute_dtype(self, layer: nn.Module) -> torch.dtype | None:
        return _parts(layer, "weight")[1].dtype


class SpectralNormHook(Hooked):
    """``weight_orig`` divided by its largest singular value: read, never written."""

    name = "spectral_norm"

    def refusal(self, layer: nn.Module, name: str = "weight") -> str | None:
        return (
            f"`{name}` of {type(layer).__name__} is under spectral_norm, which divides whatever is "
            f"written; call torch.nn.utils.remove_spectral_norm(layer, {name!r}) first, or keep "
            "the adapter"
        )

    def read(self, layer: nn.Module, name: str = "weight") -> Tensor:
        with torch.no_grad():
            weight = holder(layer, name).compute_weight(layer, do_power_iteration=False)
        return cast(Tensor, weight)

    def compute_dtype(self, layer: nn.Module) -> torch.dtype | None:
        return cast(Tensor, layer._parameters["weight_orig"]).dtype


def _parts(layer: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    g, v = layer._parameters[f"{name}_g"], layer._parameters[f"{name}_v"]
    assert g is not None and v is not None, "the hook has made both"
    return g, v


STORAGES.register("torch.nn.utils.weight_norm.WeightNorm")(WeightNormHook())
STORAGES.register("torch.nn.utils.spectral_norm.SpectralNorm")(SpectralNormHook())
