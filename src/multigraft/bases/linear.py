"""Linear layers: ``y = x Wᵀ + b``, and transformers' Conv1D, which stores ``Wᵀ``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multigraft import kernels
from multigraft.bases.contract import GEOMETRIES, Geometry, plain_call


class Linear(Geometry):
    """``nn.Linear`` and its kin: weight ``(out, in)``."""

    name = "linear"
    is_linear = True
    is_matmul = True

    def sizes(self, layer: nn.Module) -> tuple[int, int]:
        return int(layer.in_features), int(layer.out_features)  # type: ignore[arg-type]

    def project(self, layer: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        return F.linear(x, A)

    def lift(self, layer: nn.Module, h: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(h, B, bias)

    def add_low_rank(
        self, layer: nn.Module, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float
    ) -> Tensor:
        return kernels.low_rank_add(y, x, A, B, scale)

    def frozen_matrix(self, layer: nn.Module) -> tuple[Tensor, Tensor | None] | None:
        return plain_call(layer, nn.Linear.forward)

    def run(self, layer: nn.Module, x: Tensor, W: Tensor) -> Tensor:
        return F.linear(x, W)

    def exchange_rows(
        self, layer: nn.Module, y: Tensor, x: Tensor, index: Tensor, own: Tensor, new: Tensor
    ) -> Tensor:
        change = F.linear(x, (new - own).to(x.dtype))
        return y.index_add(-1, index, change.to(y.dtype))

    def product(self, layer: nn.Module, A: Tensor, B: Tensor) -> Tensor:
        return B @ A

    def matrices(self, layer: nn.Module, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor] | None:
        return B, A


class TransposedLinear(Linear):
    """A linear layer whose weight is stored ``(in, out)``."""

    name = "conv1d_transposed"
    is_transposed = True

    def sizes(self, layer: nn.Module) -> tuple[int, int]:
        in_, out = layer.weight.shape  # type: ignore[misc]
        return int(in_), int(out)

    def frozen_matrix(self, layer: nn.Module) -> tuple[Tensor, Tensor | None] | None:
        found = plain_call(layer, type(layer).forward) if self.understands(layer) else None
        return None if found is None else (found[0].T, found[1])

    def run(self, layer: nn.Module, x: Tensor, W: Tensor) -> Tensor:
        return F.linear(x, W.T)

    def product(self, layer: nn.Module, A: Tensor, B: Tensor) -> Tensor:
        return torch.mm(A.T, B.T)

    def matrices(self, layer: nn.Module, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor] | None:
        return A.T, B.T

    def as_matrix(self, layer: nn.Module, W: Tensor) -> Tensor:
        return W.T

    def from_matrix(self, layer: nn.Module, M: Tensor) -> Tensor:
        return M.T


GEOMETRIES.register(nn.Linear)(Linear())
GEOMETRIES.register("transformers.pytorch_utils.Conv1D")(TransposedLinear())
