"""The low-rank pairs of several adapters at one layer, or at several that read one input.

In inference what is stacked of them is made once per layer and route (one call, one `generate`, one
`mixed_batch` block) and goes with the route, so its memory is bounded by the adapters of one batch
and it can never be older than their values. In training it is made anew, and gradients flow
through it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from multigraft import kernels
from multigraft.graft import Graft
from multigraft.kernels import Dropped, Part, Stack
from multigraft.routing import Grouping
from multigraft.site import Site

FEW_TOKENS = 512
"""Up to so many rows times tokens, a GPU is faster with one wide product than with many."""

Pair = tuple[Tensor, Tensor, float]
Frozen = tuple[Tensor, Tensor | None]


class Bank:
    """Pairs of equally many adapters at each layer.

    Args:
        pairs: (A, B, scale) by layer and adapter; at least one.
        dtype: what they are cast to.
    """

    def __init__(self, pairs: Sequence[Sequence[Pair]], dtype: torch.dtype) -> None:
        self.pairs = pairs
        self.dtype = dtype
        self.ranks = [max(A.shape[0] for A, _, _ in own) for own in pairs]
        self._wide: tuple[Tensor, list[Tensor]] | None = None
        self._masks: dict[int, Tensor] = {}
        self._stack: Stack | None = None

    def wide(self) -> tuple[Tensor, list[Tensor]]:
        """A of all, ``(Σ adapters · rank, in)``, and each layer's B, ``(adapters, rank, out)``."""
        if self._wide is None:
            own = list(zip(self.pairs, self.ranks, strict=True))
            rows = [_padded(A, rank) for pairs, rank in own for A, _, _ in pairs]
            Bs = [torch.stack([_padded(B.T, rank) for _, B, _ in pairs]) for pairs, rank in own]
            self._wide = torch.cat(rows).to(self.dtype), [B.to(self.dtype) for B in Bs]
        return self._wide

    def scales(self) -> list[Tensor]:
        """``(adapters,)`` of each layer."""
        device = self.pairs[0][0][0].device
        return [
            kernels.constants(tuple([scale for _, _, scale in own]), self.dtype, device)
            for own in self.pairs
        ]

    def takes(self, x: Tensor, grouping: Grouping) -> bool:
        """Whether `run` can do these rows."""
        return not torch.is_grad_enabled() if self.is_few(x) else grouping.in_order

    def run(
        self,
        x: Tensor,
        frozen: Sequence[Frozen],
        grouping: Grouping,
        dropped: Dropped | None = None,
    ) -> list[Tensor]:
        """The base layers' outputs and each row's own contributions, in one go.

        Args:
            x: (rows, ..., in), which `takes` is asked about.
            frozen: each base layer's weight and bias, whose call is nothing more than them.
            dropped: what the pairs see in place of ``x``.
        """
        if self.is_few(x):
            return self._run_few(x, frozen, grouping, x if dropped is None else dropped.x)
        parts = [
            Part(*own, *(tuple(column) for column in zip(*pairs, strict=True)))
            for own, pairs in zip(frozen, self.pairs, strict=True)
        ]
        if torch.is_grad_enabled():
            return kernels.adapted_linears(x, parts, dropped)
        if self._stack is None:
            self._stack = Stack.of(parts, self.dtype)
        return kernels.adapted_linears(x, parts, dropped, self._stack)

    def _run_few(
        self, x: Tensor, frozen: Sequence[Frozen], grouping: Grouping, seen: Tensor
    ) -> list[Tensor]:
        """One narrow product for all layers and adapters; foreign columns are set to zero."""
        flat = x.reshape(-1, x.shape[-1])
        each = flat.shape[0] // x.shape[0]
        A, Bs = self.wide()
        s = torch.mm(seen.reshape(flat.shape), A.T)
        mask = self._mask(grouping)
        s.view(x.shape[0], each, -1).mul_(mask[:, None])
        ys, start = [], 0
        for (W, bias), B in zip(frozen, Bs, strict=True):
            own = s.narrow(1, start, B.shape[0] * B.shape[1])
            start += own.shape[1]
            y = F.linear(flat, W, bias).addmm_(own, B.flatten(0, 1))
            ys.append(y.view(*x.shape[:-1], -1))
        return ys

    def add(self, y: Tensor, x: Tensor, grouping: Grouping) -> Tensor:
        """``y`` plus each row's own contribution, at a single layer.

        Args:
            y, x: (rows, ..., out) and (rows, ..., in).
        """
        A, (B, *_) = self.wide()
        A, scale = A.view(B.shape[0], B.shape[1], -1), self.scales()[0]
        if self.is_few(x):
            return kernels.masked(y, x, A, B, self._mask(grouping))
        places = grouping.valid.to(scale) * scale[:, None]
        return kernels.grouped(y, x, A, B, places, grouping.slots, grouping.in_order)

    def is_few(self, x: Tensor) -> bool:
        """Whether there are so few tokens that launches cost more than products."""
        return x.is_cuda and x.numel() <= FEW_TOKENS * x.shape[-1]

    def _mask(self, grouping: Grouping) -> Tensor:
        """The scale in the columns of each row's own adapter, else zero: ``(rows, Σ rank)``."""
        rows = grouping.one_hot.shape[0]
        if rows not in self._masks:
            hot = grouping.one_hot.to(self.dtype)
            self._masks[rows] = torch.cat(
                [
                    (hot * scale).repeat_interleave(rank, dim=1)
                    for scale, rank in zip(self.scales(), self.ranks, strict=True)
                ],
                dim=1,
            )
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


def rate(grafts: Sequence[Graft], training: bool) -> float:
    """The dropout of what these adapters see; several are one part only where they have none."""
    return grafts[0].method.dropout if training and len(grafts) == 1 else 0.0


def joined(grafts: Sequence[Graft], training: bool, dropout: bool = False) -> Pair | None:
    """One pair that adds what all of these add, where each is a `pair`.

    Args:
        dropout: whether the caller drops elements of what a single one sees.
    """
    pairs = [pair(graft, training, dropout and len(grafts) == 1) for graft in grafts]
    whole = [found for found in pairs if found is not None]
    if not whole or len(whole) < len(pairs):
        return None
    if len(whole) == 1:
        return whole[0]
    As, Bs, scale = zip(*whole, strict=True)
    return torch.cat(As), torch.cat([B * s for B, s in zip(Bs, scale, strict=True)], dim=1), 1.0


def frozen_of(site: Site, x: Tensor) -> Frozen | None:
    """The base layer's weight and bias, if its call is nothing more and in the input's dtype."""
    if site.geometry is None or kernels.is_autocasting(x):
        return None
    found = site.geometry.frozen_matrix(site.layer)
    return found if found is not None and found[0].dtype == x.dtype else None


def _padded(factor: Tensor, rank: int) -> Tensor:
    missing = rank - factor.shape[0]
    return F.pad(factor, (0, 0, 0, missing)) if missing else factor
