"""A matrix that a module's own forward reads from a parameter of another name than its weight."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from multigraft.bases.contract import Geometry


class Matrix(Geometry):
    """A parameter ``(out, in)``, named; every method of linear layers acts on it.

    Its module runs its own forward with the adapted tensor in the parameter's place, so there is
    no low-rank path beside it: nothing here takes an input.
    """

    name = "linear"

    def __init__(self, parameter: str) -> None:
        self.parameter = parameter

    def sizes(self, layer: nn.Module) -> tuple[int, int]:
        out, in_ = cast(Tensor, getattr(layer, self.parameter)).shape
        return in_, out

    def product(self, layer: nn.Module, A: Tensor, B: Tensor) -> Tensor:
        return B @ A
