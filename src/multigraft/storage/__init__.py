"""Storages: one file a format. The import list is explicit and sorted."""

from torch import nn

from multigraft.storage import bnb4, bnb8, dense, hooked, parametrised, torchao
from multigraft.storage.contract import STORAGES, Storage, holder

__all__ = [
    "STORAGES",
    "Storage",
    "bnb4",
    "bnb8",
    "dense",
    "holder",
    "hooked",
    "parametrised",
    "storage_of",
    "torchao",
]


def storage_of(layer: nn.Module, name: str = "weight") -> Storage:
    """The storage that serves this tensor of this layer: the tensor's own type first.

    A plain tensor says nothing about the layer, so there the layer's type may still name a format.
    Other tensors than the weight (a quantised layer's bias) are plain in every format.
    """
    found = STORAGES.find(type(holder(layer, name)))
    if found is not None and found is not dense.DENSE:
        return found
    if name != "weight":
        weight = storage_of(layer)
        return weight if weight is dense.FOREIGN else dense.DENSE
    return STORAGES.find(type(layer)) or dense.plain(layer)
