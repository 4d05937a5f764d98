"""What a storage is: how a layer's tensor is read densely and written back.

A storage sees neither adapter nor wrapper. `keep` and `give_back` are what makes unmerge exact:
whatever the format, the kept state restores the very bits.

A new format is one file: a subclass of `Storage`, and one `STORAGES.register` line that names the
type of the tensor (or of whatever holds it, see `holder`), else of the layer.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from multigraft.registry import TypeRegistry


class Storage:
    """How one kind of tensor is stored. Stateless; every call names the layer and the tensor."""

    name: ClassVar[str]
    is_exact: ClassVar[bool] = True
    """Whether reading after writing gives the written values, up to the stored dtype's rounding.
    Where it does not, merging measures and reports the difference."""

    def refusal(self, layer: nn.Module, name: str = "weight") -> str | None:
        """Why this layer's tensor cannot be written, and what to do; ``None`` when it can."""
        return None

    def copy_refusal(self, layer: nn.Module) -> str | None:
        """Why a copy of this layer cannot be trained, and what to do; ``None`` when it can."""
        if self.is_exact:
            return None
        return (
            f"is quantised ({self.name}), and a quantised copy cannot be trained; keep this module "
            "out of the quantisation, or adapt it with `target_modules`"
        )

    def read(self, layer: nn.Module, name: str = "weight") -> Tensor:
        """The dense values in the layer's own layout, in a dtype that one can compute in.

        Never written to, so no copy is needed. It may cost (a 4-bit weight is dequantised): a
        forward of a plain additive adapter never calls it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `read`")

    def write(self, layer: nn.Module, value: Tensor, name: str = "weight") -> None:
        """Store ``value``, in the layer's own format, rounding once; in place where shapes allow.

        Raises:
            ValueError: the format cannot hold a value; nothing was written.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `write`")

    def in_place(self, layer: nn.Module, name: str = "weight") -> Tensor | None:
        """The tensor itself, where storing is nothing but copying into it; it can go by parts."""
        return None

    def keep(self, layer: nn.Module, name: str = "weight") -> Any:
        """Everything that `give_back` needs to restore the stored bits."""
        raise NotImplementedError(f"{type(self).__name__} must define `keep`")

    def read_kept(self, layer: nn.Module, kept: Any, name: str = "weight") -> Tensor:
        """What `read` gave when ``kept`` was kept, on the device where the layer is now."""
        raise NotImplementedError(f"{type(self).__name__} must define `read_kept`")

    def give_back(self, layer: nn.Module, kept: Any, name: str = "weight") -> None:
        """Restore exactly what `keep` saw; ``kept`` stays good."""
        raise NotImplementedError(f"{type(self).__name__} must define `give_back`")

    def shape(self, layer: nn.Module, name: str = "weight") -> tuple[int, ...]:
        """Of the dense values, however they are packed."""
        held = holder(layer, name)
        return tuple(held.shape if isinstance(held, Tensor) else self.read(layer, name).shape)

    def make_differentiable(self, layer: nn.Module, name: str = "weight") -> None:
        """Undo what the layer's evaluation did to this tensor that would stop gradients."""

    def compute_dtype(self, layer: nn.Module) -> torch.dtype | None:
        """The floating dtype that new adapter tensors take, or ``None`` for the default."""
        return None


STORAGES: TypeRegistry[Storage] = TypeRegistry("storage")
"""Formats by the type of what holds the tensor first, then of the layer."""


def holder(layer: nn.Module, name: str = "weight") -> Any:
    """What holds this tensor, whose type names its storage; ``None`` when nothing below does.

    The parameter itself, the list of its parametrisations, or the hook that computes it before
    each forward. Nothing is computed to find out: reading a parametrised weight can change its
    buffers.
    """
    parameter = layer._parameters.get(name)
    if parameter is not None:
        return parameter
    parametrisations = layer._modules.get("parametrizations")
    if isinstance(parametrisations, nn.ModuleDict) and name in parametrisations:
        return parametrisations[name]
    hooks = layer._forward_pre_hooks.values()
    return next((hook for hook in hooks if getattr(hook, "name", None) == name), None)


def refill(old: Tensor | None, new: Tensor) -> Tensor:
    """``new``'s values in ``old``'s memory where they fit, else a copy on ``old``'s device.

    In place, so that addresses held elsewhere stay good.
    """
    is_fixed = old is not None and old.is_inference() and not torch.is_inference_mode_enabled()
    if old is not None and not is_fixed and old.shape == new.shape and old.dtype == new.dtype:
        return old.copy_(new)
    return new.clone() if old is None else new.to(old.device, copy=True)
