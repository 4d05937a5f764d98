"""The low-rank pairs of several adapters at one layer, stacked for the routed operators.

    A: (adapters, rank, in)   B: (adapters, rank, out)   scale: (adapters,)

In inference a stack is made once per layer and route (one call, one `generate`, one `mixed_batch`
block) and goes with the route, so its memory is bounded by the adapters of one batch and it can
never be older than their values. In training it is made anew, and gradients flow through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from multigraft import kernels
from multigraft.graft import Graft
from multigraft.routing import Grouping

FEW_TOKENS = 512
"""Up to so many rows times tokens, a GPU is faster with one wide product than with many."""

Pair = tuple[Tensor, Tensor, float]
Frozen = tuple[Tensor, Tensor | None]


class Bank:
    """Stacked pairs.

    Args:
        pairs: (A, B, scale) of each adapter; at least one.
        dtype: what they are cast to.
    """

    def __init__(self, pairs: Sequence[Pair], dtype: torch.dtype) -> None:
        rank = max(A.shape[0] for A, _, _ in pairs)
        self.A = torch.stack([_padded(A, rank) for A, _, _ in pairs]).to(dtype)
        self.B = torch.stack([_padded(B.T, rank) for _, B, _ in pairs]).to(dtype)
        self.scale = scales(tuple(scale for _, _, scale in pairs), dtype, self.A.device)
        self._masks: dict[int, Tensor] = {}

    def run(self, x: Tensor, frozen: Frozen | None, grouping: Grouping) -> Tensor | None:
        """The base layer's output and each row's own contribution in one node, where that helps.

        Args:
            x: (rows, ..., in).
            frozen: the base layer's weight and bias, if its call is nothing more than them.
        """
        if frozen is None or not grouping.in_order or self.is_few(x):
            return None
        return kernels.grouped_linear(x, *frozen, self.A, self.B, self.scale)

    def add(self, y: Tensor, x: Tensor, grouping: Grouping, in_place: bool) -> Tensor:
        """``y`` plus each row's own contribution.

        Args:
            y, x: (rows, ..., out) and (rows, ..., in).
            in_place: whether ``y`` may be written to.
        """
        if self.is_few(x):
            return kernels.masked(y, x, self.A, self.B, self._mask(grouping), in_place)
        scale = grouping.valid.to(self.scale) * self.scale[:, None]
        return kernels.grouped(y, x, self.A, self.B, scale, grouping.slots, grouping.in_order)

    def is_few(self, x: Tensor) -> bool:
        """Whether there are so few tokens that launches cost more than products."""
        return x.is_cuda and x.numel() <= FEW_TOKENS * x.shape[-1]

    def _mask(self, grouping: Grouping) -> Tensor:
        rows = grouping.one_hot.shape[0]
        if rows not in self._masks:
            mask = grouping.one_hot.to(self.scale) * self.scale
            self._masks[rows] = mask.repeat_interleave(self.A.shape[1], dim=1)
        return self._masks[rows]


def pair(graft: Graft, training: bool, dropout: bool = False) -> Pair | None:
    """(A, B, scale) when this graft adds exactly ``scale · (x Aᵀ) Bᵀ`` to the layer's output.

    Args:
        dropout: whether the caller drops elements of ``x`` itself.
    """
    method = graft.method
    geometry = method.site.geometry
    if geometry is None or not geometry.is_matmul or method.site.parameter is not None:
        return None
    if training and (method.rank_dropout or method.module_dropout or not method.trains_as_pair):
        return None
    if training and method.dropout and not dropout:
        return None
    return method.low_rank(graft.params)


def joined(grafts: Sequence[Graft], training: bool) -> Pair | None:
    """One pair that adds what all of these add, where each is a `pair`."""
    pairs = [pair(graft, training) for graft in grafts]
    whole = [found for found in pairs if found is not None]
    if not whole or len(whole) < len(pairs):
        return None
    if len(whole) == 1:
        return whole[0]
    As, Bs, scale = zip(*whole, strict=True)
    return torch.cat(As), torch.cat([B * s for B, s in zip(Bs, scale, strict=True)], dim=1), 1.0


@lru_cache(maxsize=256)
def scales(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """These numbers as a tensor, made once: each copy to a device would wait for it."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def _padded(factor: Tensor, rank: int) -> Tensor:
    missing = rank - factor.shape[0]
    return torch.nn.functional.pad(factor, (0, 0, 0, missing)) if missing else factor
