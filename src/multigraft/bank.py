"""The low-rank pairs of several adapters at one layer, stacked for the routed operators.

    A: (adapters, rank, in)   B: (adapters, rank, out)   scale: (adapters,)

In inference a stack is made once per layer and route (one call, one `generate`, one `mixed_batch`
block) and goes with the route, so its memory is bounded by the adapters of one batch and it can
never be older than their values. In training it is made anew, and gradients flow through it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from multigraft import kernels
from multigraft.graft import Graft
from multigraft.routing import Grouping, Route

FEW_TOKENS = 512
"""Up to so many rows times tokens, a GPU is faster with one wide product than with many."""


class Bank(NamedTuple):
    """Stacked pairs."""

    A: Tensor
    B: Tensor
    scale: Tensor

    def add(self, y: Tensor, x: Tensor, grouping: Grouping) -> Tensor:
        """``y`` plus each row's own contribution.

        Args:
            y, x: (rows, ..., out) and (rows, ..., in).
        """
        tokens = x.numel() // x.shape[-1]
        if x.is_cuda and tokens <= FEW_TOKENS:
            rank = self.A.shape[1]
            mask = (grouping.one_hot * self.scale).to(x.dtype).repeat_interleave(rank, dim=1)
            return kernels.masked(y, x, self.A, self.B, mask)
        scale = (grouping.valid * self.scale[:, None]).to(x.dtype)
        return kernels.grouped(y, x, self.A, self.B, scale, grouping.slots, grouping.in_order)


def pair(graft: Graft, training: bool) -> tuple[Tensor, Tensor, float] | None:
    """(A, B, scale) when this graft adds exactly ``scale · (x Aᵀ) Bᵀ`` to the layer's output."""
    method = graft.method
    geometry = method.site.geometry
    if geometry is None or not geometry.is_matmul or graft.site.parameter is not None:
        return None
    if training and (method.dropout or method.rank_dropout or method.module_dropout):
        return None
    return method.low_rank(graft.params)


def bank_of(
    route: Route, key: int, pairs: Mapping[str, tuple[Tensor, Tensor, float]], dtype: torch.dtype
) -> Bank:
    """The bank of these adapters' pairs at the layer that ``key`` identifies."""
    found: Bank | None = route.banks.get(key)
    if found is not None and found.A.dtype == dtype and not torch.is_grad_enabled():
        return found
    bank = _stack(list(pairs.values()), dtype)
    if not bank.A.requires_grad and not bank.B.requires_grad:
        route.banks[key] = bank
    return bank


def _stack(pairs: Sequence[tuple[Tensor, Tensor, float]], dtype: torch.dtype) -> Bank:
    rank = max(A.shape[0] for A, _, _ in pairs)
    return Bank(
        torch.stack([_padded(A, rank).to(dtype) for A, _, _ in pairs]),
        torch.stack([_padded(B.T, rank).to(dtype) for _, B, _ in pairs]),
        torch.tensor([scale for _, _, scale in pairs], device=pairs[0][0].device),
    )


def _padded(factor: Tensor, rank: int) -> Tensor:
    missing = rank - factor.shape[0]
    return torch.nn.functional.pad(factor, (0, 0, 0, missing)) if missing else factor
