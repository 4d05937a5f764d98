"""Quantised linear layers without memory: bitsandbytes' sizes, and what its kernels keep.

    nf4, fp4    half a byte an element, a byte for 64 elements, four bytes for 256 of those
    int8        a byte an element, four bytes a row

4-bit layers keep nothing for the backward pass and unpack the weight in it; 8-bit ones keep their
input. bitsandbytes is not needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multigraft.bases.contract import geometry_of
from multigraft.errors import ConfigError, did_you_mean
from multigraft.registry import qualified_name
from multigraft.storage.contract import STORAGES, Storage

BLOCK, SECOND_BLOCK = 64, 256
CODE = 16
SECOND_CODE = 256
"""Entries of the tables that 4-bit values and their statistics are looked up in."""


class PackedWeight(nn.Parameter):
    """A frozen weight on the meta device that takes fewer bytes than it has elements.

    Args:
        size: its bytes.
        shape: what it stands for.
        dtype: what it is computed in.
    """

    def __new__(cls, size: int, shape: torch.Size, dtype: torch.dtype) -> PackedWeight:
        data = torch.empty(size, dtype=torch.uint8, device="meta")
        found = torch.Tensor._make_subclass(cls, data, False)
        found.stands_for, found.computed_in = shape, dtype
        return found

    def __deepcopy__(self, memo: Any) -> PackedWeight:
        return PackedWeight(self.numel(), self.stands_for, self.computed_in)

    stands_for: torch.Size
    computed_in: torch.dtype


class PackedLinear(nn.Linear):
    """A linear layer whose weight is packed; its forward is not a plain product."""

    keeps_input = False

    @classmethod
    def of(cls, layer: Any, size: int, dtype: torch.dtype, keeps_input: bool) -> PackedLinear:
        """In place of a plain layer, or one whose weight lies the other way round."""
        geometry = geometry_of(layer)
        assert geometry is not None  # it is linear
        sizes = geometry.sizes(layer)
        with torch.device("meta"):
            found = cls(*sizes, bias=layer.bias is not None, dtype=dtype)
        found.weight = PackedWeight(size, torch.Size(reversed(sizes)), dtype)
        found.keeps_input = keeps_input
        return found

    def forward(self, input: Tensor) -> Tensor:
        return _Packed.apply(input, self.weight, self.bias, self.keeps_input)


class _Packed(torch.autograd.Function):
    """The product with a packed weight, whose gradient is the input's alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: PackedWeight, bias: Tensor | None, keeps_input: bool
    ) -> Tensor:
        ctx.save_for_backward(weight, x if keeps_input else None)
        ctx.shape, ctx.dtype = weight.stands_for, weight.computed_in
        whole = x.new_empty(ctx.shape, dtype=ctx.dtype)
        return F.linear(x.to(ctx.dtype), whole, None if bias is None else bias.to(ctx.dtype)).to(x)

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor | None, None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        whole = dy[0].new_empty(ctx.shape, dtype=ctx.dtype)
        return (dy[0].to(ctx.dtype) @ whole).to(dy[0]), None, None, None


class Packed(Storage):
    """`PackedWeight`: it reads as a tensor of its whole size, without values."""

    name = "bnb4"  # as far as preparing a model for training goes
    is_exact = False

    def refusal(self, layer: nn.Module, name: str = "weight") -> str | None:
        return f"`{name}` of {type(layer).__name__} has a size and no values"

    def read(self, layer: nn.Module, name: str = "weight") -> Tensor:
        weight: Any = layer._parameters[name]
        return torch.empty(weight.stands_for, dtype=weight.computed_in, device="meta")

    def shape(self, layer: nn.Module, name: str = "weight") -> tuple[int, ...]:
        weight: Any = layer._parameters[name]
        return tuple(weight.stands_for)

    def compute_dtype(self, layer: nn.Module) -> torch.dtype | None:
        weight: Any = layer._parameters["weight"]
        return weight.computed_in


STORAGES.register(PackedWeight)(Packed())


def four_bits(weight: Tensor) -> int:
    """Bytes of a weight in four bits with doubly quantised statistics."""
    blocks = -(-weight.numel() // BLOCK)
    second = -(-blocks // SECOND_BLOCK)
    tables = 4 * (CODE + SECOND_CODE + 1)
    return -(-weight.numel() // 2) + blocks + 4 * second + tables


def eight_bits(weight: Tensor) -> int:
    """Bytes of a weight in eight bits, with a scale for each output feature."""
    return weight.numel() + 4 * weight.shape[0]


REPLACED = ("torch.nn.modules.linear.Linear", "transformers.pytorch_utils.Conv1D")
"""What transformers quantises: these classes, and none of their subclasses."""
FORMATS: dict[str, tuple[Callable[[Tensor], int], bool]] = {
    "nf4": (four_bits, False),
    "fp4": (four_bits, False),
    "int8": (eight_bits, True),
}
"""Bytes of a weight, and whether layers keep their input for the backward pass."""


def pack(model: nn.Module, quantize: str, dtype: torch.dtype) -> None:
    """Put `PackedLinear` in place of every linear layer but the output head.

    Raises:
        ConfigError: there is no such format.
    """
    if quantize not in FORMATS:
        raise ConfigError(
            f"`quantize` (={quantize!r}) must be one of {', '.join(FORMATS)}."
            f"{did_you_mean(quantize, FORMATS)}"
        )
    size, keeps_input = FORMATS[quantize]
    spared = _spared(model)
    for path, layer in list(model.named_modules()):
        if qualified_name(type(layer)) not in REPLACED or path in spared:
            continue
        packed = PackedLinear.of(layer, size(layer.weight), dtype, keeps_input)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, packed.train(layer.training))


def _spared(model: nn.Module) -> set[str]:
    """Paths of the layers that transformers leaves as they are: the head, or the last layer."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    heads = {path for path, module in model.named_modules() if module is head}
    *_, last = (path for path, _ in model.named_parameters())
    return heads | {last.removesuffix(".weight")}
