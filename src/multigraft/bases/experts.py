"""Fused experts: one parameter that holds the weights of all experts of a mixture, in a stack.

    W: (experts, out, in), or (experts, in, out) where the module says ``is_transposed``

    ΔW[e] = B[e] A[e]        A: (experts * rank, in), expert by expert
                             B: (out, rank * experts), rank by rank, and the experts within

The rows of A and the columns of B run in different orders: so do they in PEFT's files.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from multigraft.bases._matrix import Matrix
from multigraft.bases.contract import Geometry


class Experts(Geometry):
    """A parameter of three dimensions, named; each expert has its own pair of factors."""

    name = "experts"
    takes_rows = False

    def __init__(self, parameter: str) -> None:
        self.parameter = parameter

    def tells_rows(self, layer: nn.Module) -> bool:
        # Others are given tokens that somebody has sorted by expert.
        return _takes_choices(cast(Any, type(layer)))

    def sizes(self, layer: nn.Module) -> tuple[int, int]:
        """``(in, out)`` of one expert."""
        _, out, in_ = self._stack(layer).shape
        return (out, in_) if _is_transposed(layer) else (in_, out)

    def factor_shapes(self, layer: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        in_, out = self.sizes(layer)
        count = len(self._stack(layer)) * rank
        return (count, in_), (out, count)

    def product(self, layer: nn.Module, A: Tensor, B: Tensor) -> Tensor:
        return torch.bmm(*self._factors(layer, A, B))

    def add_product(
        self, layer: nn.Module, W: Tensor, A: Tensor, B: Tensor, scale: float
    ) -> Tensor:
        # One operation: a stack of experts is most of a model, and a second one of ΔW too many.
        return torch.baddbmm(W, *self._factors(layer, A.to(W.dtype), B.to(W.dtype)), alpha=scale)

    def pairs(self, layer: nn.Module, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        experts = len(self._stack(layer))
        return A.unflatten(0, (experts, -1)), B.unflatten(1, (-1, experts)).permute(2, 0, 1)

    def from_pairs(self, layer: nn.Module, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)

    def as_matrices(self, layer: nn.Module, W: Tensor) -> Tensor:
        return W.mT if _is_transposed(layer) else W

    def from_matrices(self, layer: nn.Module, M: Tensor) -> Tensor:
        return self.as_matrices(layer, M)

    def count(self, layer: nn.Module) -> int | None:
        return len(self._stack(layer))

    def _factors(self, layer: nn.Module, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """The two stacks whose product lies as the parameter does."""
        a, b = self.pairs(layer, A, B)
        return (a.mT, b.mT) if _is_transposed(layer) else (b, a)

    def _stack(self, layer: nn.Module) -> Tensor:
        return cast(Tensor, getattr(layer, self.parameter))


def parameter_geometry(layer: nn.Module, name: str) -> Geometry | None:
    """The geometry of a parameter that is targeted by its own name; None when nothing serves it."""
    dimensions = cast(Tensor, getattr(layer, name)).dim()
    return {2: Matrix, 3: Experts}[dimensions](name) if dimensions in (2, 3) else None


@lru_cache(maxsize=256)
def _takes_choices(cls: Any) -> bool:
    """Whether a module is given all tokens in order, and beside them each one's experts.

    As transformers': ``(hidden_states, top_k_index, top_k_weights)``, under several names.
    """
    names = [*inspect.signature(cls.forward).parameters][2:]
    return len(names) > 1 and any(word in n for n in names for word in ("ind", "experts"))


def _is_transposed(layer: nn.Module) -> bool:
    """Whether the module stores ``(experts, in, out)``; transformers' experts say it themselves."""
    return bool(getattr(layer, "is_transposed", False))
