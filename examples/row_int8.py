"""A storage of one's own in one file: a linear layer that keeps its rows in 8 bits.

    W ≈ codes * scale[:, None]        codes: int8 (out, in)   scale: (out,)

Every method of the library trains on it, merges into it and comes out of it again.
"""

import torch
from torch import nn

from multigraft.bases import GEOMETRIES
from multigraft.storage import STORAGES, Storage


class RowInt8Linear(nn.Module):
    """Made from an `nn.Linear`; its bias stays as it was."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        for name, tensor in zip(("codes", "scale"), quantise(linear.weight.detach()), strict=True):
            self.register_buffer(name, tensor)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, (self.codes * self.scale[:, None]).to(x.dtype), self.bias)


class RowInt8(Storage):
    """Where the values lie: ``codes`` and ``scale``. It knows of no adapter."""

    name = "row_int8"
    is_exact = False

    def read(self, layer, name="weight"):
        return layer.codes * layer.scale[:, None]

    def write(self, layer, value, name="weight"):
        self.give_back(layer, quantise(value), name)

    def keep(self, layer, name="weight"):
        return layer.codes.clone(), layer.scale.clone()

    def read_kept(self, layer, kept, name="weight"):
        return kept[0] * kept[1][:, None]

    def give_back(self, layer, kept, name="weight"):
        layer.codes.copy_(kept[0])
        layer.scale.copy_(kept[1])


def quantise(W):
    """The nearest codes, with one scale a row."""
    scale = W.float().abs().amax(1).clamp_min(1e-12) / 127
    return (W / scale[:, None]).round().to(torch.int8), scale


STORAGES.register(RowInt8Linear)(RowInt8())
GEOMETRIES.register(RowInt8Linear)(GEOMETRIES.find(nn.Linear))
