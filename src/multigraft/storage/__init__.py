"""Storages: one file a format. The import list is explicit and sorted."""

import math
from collections.abc import Iterator

from torch import nn

from multigraft.storage import bnb4, bnb8, dense, hooked, parametrised, sharded, torchao
from multigraft.storage.contract import STORAGES, Storage, holder
from multigraft.storage.dense import DENSE
from multigraft.storage.foreign import Foreign, foreign, is_understood
from multigraft.storage.slot import Slot

__all__ = [
    "DENSE",
    "FOREIGN",
    "STORAGES",
    "Slot",
    "Storage",
    "bnb4",
    "bnb8",
    "dense",
    "holder",
    "hooked",
    "let_gradients_through",
    "parameter_counts",
    "parametrised",
    "sharded",
    "slot_of",
    "storage_of",
    "torchao",
]


FOREIGN = foreign(DENSE)


def storage_of(layer: nn.Module, name: str = "weight") -> Storage:
    """The storage that serves this tensor of this layer: the tensor's own type first.

    A plain tensor says nothing about the layer, so there the layer's type may still name a format;
    and where the layer does something of its own with its tensors, only its type can name one.
    Other tensors than the weight (a quantised layer's bias) are plain in every format.
    """
    held = holder(layer, name)
    found = STORAGES.find(type(held)) or DENSE
    if found is DENSE and name != "weight":
        return FOREIGN if isinstance(storage_of(layer), Foreign) else DENSE
    if found is not DENSE and is_understood(layer, held):
        return found
    own = STORAGES.find(type(layer))
    return own or (found if is_understood(layer, held) else foreign(found))


def slot_of(layer: nn.Module, name: str = "weight") -> Slot:
    """The tensor of this layer, or of a module inside it, that has this name in its state dict."""
    path, _, leaf = name.rpartition(".")
    owner = layer.get_submodule(path)
    return Slot(storage_of(owner, leaf), owner, leaf)


def let_gradients_through(model: nn.Module) -> None:
    """Make every weight of the model one that gradients flow through to the layer's input.

    In evaluation a format may lay its weights out in a way that has no backward.
    """
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and type(weight) is not nn.Parameter:  # plain ones, the many, are
            storage_of(module).make_differentiable(module)


def parameter_counts(model: nn.Module) -> Iterator[tuple[nn.Parameter, int]]:
    """Every parameter once, with the number of dense values that it holds.

    Of a parameter that DeepSpeed keeps elsewhere, that is what it says itself.
    """
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                count = math.prod(storage_of(module, name).shape(module, name))
                yield parameter, count or getattr(parameter, "ds_numel", 0)
