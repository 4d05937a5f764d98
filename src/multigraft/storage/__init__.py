"""Storages: one file a format. The import list is explicit and sorted."""

from torch import nn

from multigraft.storage import dense
from multigraft.storage.contract import STORAGES, Storage

__all__ = ["STORAGES", "Storage", "dense", "storage_of"]


def storage_of(layer: nn.Module) -> Storage:
    """The storage that serves this layer: its weight's type first, then the layer's own.

    A plain tensor says nothing about the layer, so there the layer's type may still name a format.
    """
    found = STORAGES.find(type(getattr(layer, "weight", None)))
    if found is not None and found is not dense.DENSE:
        return found
    return STORAGES.find(type(layer)) or dense.plain(layer)
