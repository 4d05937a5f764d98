"""What a geometry is: how a low-rank pair runs through one kind of layer.

A geometry is stateless; every call names the base layer. It alone knows how the layer's weight is
laid out (Conv1D stores it transposed, an embedding is a lookup); no method ever sees that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from multigraft.registry import TypeRegistry


class Part(NamedTuple):
    """One tensor of a layer that is targeted as a whole.

    Args:
        inner: the child that holds it; empty for the layer itself.
        parameter: its name, when it is not the weight behind a forward.
        geometry: how it is shaped.
        times: how often PEFT adds an update of it, and so what its files mean.
    """

    inner: str
    parameter: str | None
    geometry: Geometry
    times: int = 1


class Geometry:
    """How one kind of layer is shaped; ``in_``/``out`` are sizes of the matrix it stands for."""

    name: ClassVar[str]
    is_matmul: ClassVar[bool] = False
    """Whether `project` and `lift` are products with A and B over the last axis."""
    is_linear: ClassVar[bool] = False
    """Whether ``target_modules="all-linear"`` includes this kind of layer."""
    is_transposed: ClassVar[bool] = False
    """Whether the weight is stored ``(in, out)``; files say it as ``fan_in_fan_out``."""
    takes_rows: ClassVar[bool] = True
    """Whether the layer's input has the batch's rows, one after another."""
    plain_only: ClassVar[bool] = False
    """Whether nothing but a plain low-rank pair can act here."""
    factors: ClassVar[tuple[str, str]] = ("lora_A.weight", "lora_B.weight")
    """Names of a low-rank pair's tensors, in memory and on disk."""

    def tells_rows(self, layer: nn.Module) -> bool:
        """Whether rows of a batch can be told apart in what this layer is given."""
        return self.takes_rows

    def sizes(self, layer: nn.Module) -> tuple[int, int]:
        """``(in, out)`` of the layer."""
        raise NotImplementedError(f"{type(self).__name__} must define `sizes`")

    def whole_refusal(self, layer: nn.Module) -> str | None:
        """Why this layer cannot be adapted as a whole, and what to do; ``None`` when it can."""
        return None

    def parts(self, layer: nn.Module) -> tuple[Part, ...]:
        """What targeting this layer means: its weight, unless it is made of several."""
        return (Part("", None, self),)

    def understands(self, layer: nn.Module) -> bool:
        """Whether the layer runs the forward that this geometry describes, not one of its own."""
        for cls in type(layer).__mro__:
            if cls in GEOMETRIES:
                return GEOMETRIES.find(cls) is self
            if "forward" in vars(cls):
                return False
        return False

    def factor_shapes(self, layer: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B; ``(rank, in)`` and ``(out, rank)`` where the layer is a matrix."""
        in_, out = self.sizes(layer)
        return (rank, in_), (out, rank)

    def check_rank(self, layer: nn.Module, rank: int) -> str | None:
        """Why this rank cannot be used on this layer, or ``None``."""
        return None

    def project(self, layer: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        """The shrink: ``x`` (the layer's own input) to ``(..., rank)`` or its spatial kin."""
        raise NotImplementedError(f"{type(self).__name__} must define `project`")

    def lift(self, layer: nn.Module, h: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
        """The expand: ``h`` of `project` to the layer's output."""
        raise NotImplementedError(f"{type(self).__name__} must define `lift`")

    def add_low_rank(
        self, layer: nn.Module, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float
    ) -> Tensor:
        """``y + scale * lift(project(x, A), B)``; a geometry with a fused kernel overrides it."""
        update = self.lift(layer, self.project(layer, x, A), B)
        return y + (update * scale).to(y.dtype)

    def frozen_matrix(self, layer: nn.Module) -> tuple[Tensor, Tensor | None] | None:
        """``(W, bias)`` when the layer's call is ``x Wᵀ + bias`` and nothing more; else None.

        W is ``(out, in)``. Nothing more: no hook would see the call, and neither takes gradients.
        """
        return None

    def run(self, layer: nn.Module, x: Tensor, W: Tensor) -> Tensor:
        """The layer's arithmetic for input ``x`` with ``W`` (in its layout) and without a bias."""
        raise NotImplementedError(f"{type(self).__name__} must define `run`")

    def row_sizes(self, layer: nn.Module) -> tuple[int, int]:
        """``(rows, width)`` of the weight as it is stored."""
        in_, out = self.sizes(layer)
        return out, in_

    def exchange_rows(
        self, layer: nn.Module, y: Tensor, x: Tensor, index: Tensor, own: Tensor, new: Tensor
    ) -> Tensor:
        """What the output ``y`` for ``x`` becomes when some rows of the weight are others.

        Args:
            index: which rows of the stored weight, ``(n,)``, each once.
            own, new: their values now and then, ``(n, width)``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `exchange_rows`")

    def product(self, layer: nn.Module, A: Tensor, B: Tensor) -> Tensor:
        """``B A`` in the layout and shape of the layer's weight."""
        raise NotImplementedError(f"{type(self).__name__} must define `product`")

    def matrices(self, layer: nn.Module, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor] | None:
        """Two matrices whose product is `product`, where the weight is a matrix; else None."""
        return None

    def pairs(self, layer: nn.Module, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """The independent pairs of matrices that A and B hold: groups, or experts, or one.

        Returns:
            ``(n, rank, in)`` and ``(n, out, rank)``; each product is a part of ΔW of its own.
        """
        return A.flatten(1)[None], B.flatten(1)[None]

    def from_pairs(self, layer: nn.Module, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `pairs`."""
        return a[0], b[0]

    def as_matrices(self, layer: nn.Module, W: Tensor) -> Tensor:
        """What `product` gives, as the products of `pairs`: ``(n, out, in)``."""
        return self.as_matrix(layer, W)[None]

    def from_matrices(self, layer: nn.Module, M: Tensor) -> Tensor:
        """The inverse of `as_matrices`."""
        return self.from_matrix(layer, M[0])

    def count(self, layer: nn.Module) -> int | None:
        """How many matrices the layer holds, where it is a stack of them; else None."""
        return None

    def add_product(
        self, layer: nn.Module, W: Tensor, A: Tensor, B: Tensor, scale: float
    ) -> Tensor:
        """``W + scale * B A`` in ``W``'s dtype; a geometry with a fused operator overrides it."""
        return W + (self.product(layer, A, B) * scale).to(W.dtype)

    def as_matrix(self, layer: nn.Module, W: Tensor) -> Tensor:
        """The weight as a matrix ``(out, in)``; convolution kernels are flattened into ``in``."""
        return W

    def from_matrix(self, layer: nn.Module, M: Tensor) -> Tensor:
        """The inverse of `as_matrix`: a matrix ``(out, in)`` back in the weight's own layout."""
        return M

    def fold_input(self, layer: nn.Module, W: Tensor, map_: Callable[[Tensor], Tensor]) -> Tensor:
        """The weight ``W'`` with ``W' x = W map_(x)``, for a map that is linear in the input."""
        # y = W m(x) with m linear: W' = W M, and a pull-back of m gives each row of W times M.
        M = self.as_matrix(layer, W)
        _, pull, *_ = torch.func.vjp(map_, torch.zeros_like(M))
        return self.from_matrix(layer, pull(M)[0])

    def fold_output(self, layer: nn.Module, W: Tensor, map_: Callable[[Tensor], Tensor]) -> Tensor:
        """The weight ``W'`` with ``W' x = map_(W x)``, for a map that is linear in the output."""
        return self.from_matrix(layer, map_(self.as_matrix(layer, W).T).T)

    def feature_axis(self, layer: nn.Module) -> int:
        """The axis of the *output* that runs over the layer's ``out`` features."""
        return -1

    def input_dtype(self, x: Tensor, A: Tensor) -> torch.dtype:
        """The dtype in which the low-rank path is computed.

        It is the input's, so that the small factors are cast and never the activations.
        """
        return x.dtype if x.is_floating_point() else A.dtype


def plain_call(layer: nn.Module, forward: Callable[..., Tensor]) -> tuple[Tensor, Any] | None:
    """The layer's own weight and bias when a call would run ``forward`` and nothing else."""
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if (
        type(weight) is not nn.Parameter
        or weight.requires_grad
        or type(layer).forward is not forward
        or "forward" in layer.__dict__
        or layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or (bias is not None and (type(bias) is not nn.Parameter or bias.requires_grad))
        or torch.nn.modules.module._has_any_global_hook()
    ):
        return None
    return weight, bias


GEOMETRIES: TypeRegistry[Geometry] = TypeRegistry("geometry")
"""Kinds of layers by type; a new kind is one file that registers itself here."""

HOSTS: TypeRegistry[frozenset[str]] = TypeRegistry("host of layers that do not run")
"""Parents that never run some of their children but read their tensors; by type, the children.
An adapter on such a child lives at the parent, as a change of the parent's tensors."""

READERS: TypeRegistry[frozenset[str]] = TypeRegistry("parent that may bypass its children")
"""Parents that sometimes read their children's tensors rather than run them; by type, the
children. Such a child, adapted, shows its adapted tensors."""


def geometry_of(layer: nn.Module) -> Geometry | None:
    """The geometry that serves this layer, or ``None`` when no adapter can act on it."""
    return GEOMETRIES.find(type(layer))
