"""What a storage is: how a layer's tensor is read densely and written back.

A storage sees neither adapter nor wrapper. `keep` and `give_back` are what makes unmerge exact:
whatever the format, the kept state restores the very bits.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from multigraft.registry import TypeRegistry


class Storage:
    """How one kind of weight is stored. Stateless; every call names the layer and the tensor."""

    name: ClassVar[str]
    is_exact: ClassVar[bool] = True
    """Whether reading after writing gives the written values, up to the stored dtype's rounding."""

    def refusal(self, layer: nn.Module, name: str = "weight") -> str | None:
        """Why this layer's tensor cannot be written, or ``None`` when it can."""
        return None

    def read(self, layer: nn.Module, name: str = "weight") -> Tensor:
        """The dense values in the layer's own layout; never written to, so no copy is needed."""
        raise NotImplementedError(f"{type(self).__name__} must define `read`")

    def write(self, layer: nn.Module, value: Tensor, name: str = "weight") -> None:
        """Store ``value`` in place, in the layer's own format, rounding once."""
        raise NotImplementedError(f"{type(self).__name__} must define `write`")

    def keep(self, layer: nn.Module, name: str = "weight") -> Any:
        """Everything that `give_back` needs to restore the stored bits."""
        raise NotImplementedError(f"{type(self).__name__} must define `keep`")

    def read_kept(self, layer: nn.Module, kept: Any, name: str = "weight") -> Tensor:
        """What `read` gave when ``kept`` was kept."""
        raise NotImplementedError(f"{type(self).__name__} must define `read_kept`")

    def give_back(self, layer: nn.Module, kept: Any, name: str = "weight") -> None:
        """Restore exactly what `keep` saw."""
        raise NotImplementedError(f"{type(self).__name__} must define `give_back`")

    def compute_dtype(self, layer: nn.Module) -> torch.dtype | None:
        """The floating dtype that new adapter tensors take, or ``None`` for the default."""
        return None


STORAGES: TypeRegistry[Storage] = TypeRegistry("storage")
"""Formats by the type of the weight first, then of the layer; a new format is one file."""
