"""Weights under ``torch.nn.utils.parametrize``: computed from others each time they are read.

    W = f_k(... f_1(originals))        written as  originals = f_1⁻¹(... f_k⁻¹(W))

Written only where the inverse gives back what was asked for (weight_norm does; spectral_norm and
orthogonal hold W to a constraint that a merged weight breaks).
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrize import ParametrizationList

from multigraft.storage.contract import STORAGES, Storage, holder

TOLERANCE = 1e-2
"""Relative distance, beyond any dtype's rounding, at which an inverse is none."""


class Parametrised(Storage):
    """A `ParametrizationList`: its originals are what is stored."""

    name = "parametrised"

    def refusal(self, layer: nn.Module, name: str = "weight") -> str | None:
        twin = copy.deepcopy(_list(layer, name))
        kinds = ", ".join(type(f).__name__ for f in twin)
        own = _value(twin)
        source = torch.Generator().manual_seed(0)
        noise = torch.randn(own.shape, generator=source).to(own) * own.std()
        # Far from the norm that a constraint holds the weight to, and of no structure.
        wanted = 3 * own + noise
        try:
            _invert(twin, wanted)
            distance = float((_value(twin) - wanted).norm() / wanted.norm())
        except Exception as error:
            distance, kinds = torch.inf, f"{kinds}: {error}"
        if distance <= TOLERANCE:
            return None
        return (
            f"`{name}` of {type(layer).__name__} is parametrised ({kinds}) and cannot take any "
            "value; make it plain first with torch.nn.utils.parametrize.remove_parametrizations("
            f"layer, {name!r}), or keep the adapter"
        )

    def read(self, layer: nn.Module, name: str = "weight") -> Tensor:
        return _value(_list(layer, name))

    def write(self, layer: nn.Module, value: Tensor, name: str = "weight") -> None:
        _invert(_list(layer, name), value)

    def keep(self, layer: nn.Module, name: str = "weight") -> Any:
        return {n: t.detach().clone() for n, t in _originals(_list(layer, name)).items()}

    def read_kept(self, layer: nn.Module, kept: Any, name: str = "weight") -> Tensor:
        held = _list(layer, name)
        originals = _originals(held)
        return _value(held, {n: t.to(originals[n].device) for n, t in kept.items()})

    def give_back(self, layer: nn.Module, kept: Any, name: str = "weight") -> None:
        originals = _originals(_list(layer, name))
        with torch.no_grad():
            for n, tensor in kept.items():
                originals[n].copy_(tensor)

    def compute_dtype(self, layer: nn.Module) -> torch.dtype | None:
        return next(iter(_originals(_list(layer, "weight")).values())).dtype


def _list(layer: nn.Module, name: str) -> ParametrizationList:
    return cast(ParametrizationList, holder(layer, name))


def _originals(held: ParametrizationList) -> dict[str, Tensor]:
    tables = {**held._parameters, **held._buffers}
    return {n: t for n, t in tables.items() if t is not None and n.startswith("original")}


@torch.no_grad()
def _value(held: ParametrizationList, originals: dict[str, Tensor] | None = None) -> Tensor:
    """The computed weight; in evaluation mode, since in training spectral_norm's buffers change."""
    modes = {module: module.training for module in held.modules()}
    try:
        held.eval()
        return cast(Tensor, functional_call(held, originals or {}, ()))
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def _invert(held: ParametrizationList, value: Tensor) -> None:
    originals = list(_originals(held).values())
    parts: Any = value.to(originals[0].dtype)
    for function in reversed(list(held)):
        parts = function.right_inverse(parts)  # type: ignore[operator]
    values = [parts] if isinstance(parts, Tensor) else list(parts)
    for original, part in zip(originals, values, strict=True):
        original.copy_(part)


STORAGES.register("torch.nn.utils.parametrize.ParametrizationList")(Parametrised())
