"""Layers that run a forward of their own: adapted through it, read, and never written.

Nobody knows what an unknown subclass does with its weight, however that is stored: one that scales
it, say, would scale what a merge has put there as well. A storage that is registered for the
subclass ends the doubt.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from multigraft.bases.contract import geometry_of
from multigraft.registry import qualified_name
from multigraft.storage.contract import Storage


class Foreign(Storage):
    """Another storage, less the writing.

    Args:
        inner: how the tensor is stored.
    """

    name = "foreign"

    def __init__(self, inner: Storage) -> None:
        self.inner = inner
        self.is_exact = inner.is_exact  # type: ignore[misc]

    def refusal(self, layer: nn.Module, name: str = "weight") -> str | None:
        kind = qualified_name(type(layer))
        return (
            f"`{kind}` overrides `forward`, so its `{name}` may mean something else than its base "
            f"class's; register a storage for `{kind}` (multigraft.storage.STORAGES) to merge it"
        )

    def copy_refusal(self, layer: nn.Module) -> str | None:
        return self.inner.copy_refusal(layer)

    def read(self, layer: nn.Module, name: str = "weight") -> Tensor:
        return self.inner.read(layer, name)

    def keep(self, layer: nn.Module, name: str = "weight") -> Any:
        return self.inner.keep(layer, name)

    def read_kept(self, layer: nn.Module, kept: Any, name: str = "weight") -> Tensor:
        return self.inner.read_kept(layer, kept, name)

    def write(self, layer: nn.Module, value: Tensor, name: str = "weight") -> None:
        self.inner.write(layer, value, name)

    def give_back(self, layer: nn.Module, kept: Any, name: str = "weight") -> None:
        self.inner.give_back(layer, kept, name)

    def shape(self, layer: nn.Module, name: str = "weight") -> tuple[int, ...]:
        return self.inner.shape(layer, name)

    def make_differentiable(self, layer: nn.Module, name: str = "weight") -> None:
        self.inner.make_differentiable(layer, name)

    def compute_dtype(self, layer: nn.Module) -> torch.dtype | None:
        return self.inner.compute_dtype(layer)


@cache
def foreign(inner: Storage) -> Foreign:
    """The one `Foreign` of this storage."""
    return Foreign(inner)


def is_understood(layer: nn.Module, held: Any) -> bool:
    """Whether the layer's forward is its geometry's, or from the library of what it holds.

    Args:
        held: what holds the tensor; a library's own layers know its packed weights.
    """
    geometry = geometry_of(layer)
    if geometry is None or geometry.understands(layer):
        return True
    owner = next(cls for cls in type(layer).__mro__ if "forward" in vars(cls))
    return _package(owner) == _package(type(held)) != "torch"


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]
