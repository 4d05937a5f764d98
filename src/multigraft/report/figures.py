"""Figures of one change ΔW: its norm, its spectrum, its effective rank, and where it points.

    ΔW = b a,   b = Q_b R_b,   aᵀ = Q_a R_a,   R_b R_aᵀ = u Σ vᵀ   =>   ΔW = (Q_b u) Σ (Q_a v)ᵀ

so the spectrum of a matrix of thousands of rows costs what one of a few does. Only changes that are
no product of thin factors are decomposed as they are.

    effective rank = exp(-Σ p log p),   p = σ / Σσ        Roy and Vetterli 2007
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from multigraft.inspection.change import Change

LARGEST_DENSE = 2048
"""The smaller side of a matrix without factors up to which its spectrum is computed."""
DIRECTIONS = 128
"""How many directions of a change, the strongest, are kept to compare it with others."""
NEGLIGIBLE = 1e-6
"""Singular values below this share of the largest are rounding."""

_LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


@dataclass(frozen=True, eq=False)
class SiteFigures:
    """One adapter at one site.

    Args:
        path: of the site.
        layer: the first index in the path, or None.
        module: what is left of the path, with further indices as ``*``.
        rank: of the update; 0 for methods without one.
        norm: Frobenius norm of ΔW.
        base_norm: of the weight that it changes; None without a base.
        values: singular values, the largest first; empty where they were not computed.
        left, right: singular vectors ``(out, n)`` and ``(in, n)``; None where there are several
            matrices, or none were computed.
        intruders: how many intruder dimensions; None where nobody looked.
        parameters: how many numbers the adapter holds here.
    """

    path: str
    layer: int | None
    module: str
    rank: int
    norm: float
    base_norm: float | None
    values: tuple[float, ...]
    left: Tensor | None = None
    right: Tensor | None = None
    intruders: int | None = None
    parameters: int = 0

    @property
    def relative(self) -> float | None:
        """The norm beside that of the base's weight."""
        return self.norm / self.base_norm if self.base_norm else None

    @property
    def effective_rank(self) -> float:
        """How many directions the change uses, weighted by how much."""
        total = sum(self.values)
        if not total or not math.isfinite(total):
            return 0.0
        shares = [value / total for value in self.values if value]
        return math.exp(-sum(p * math.log(p) for p in shares))


def figures_of(change: Change) -> SiteFigures:
    """The figures of one change; its intruders and parameters are not looked for."""
    left = right = None
    values: tuple[float, ...] = ()
    decomposed = _decomposed(change)
    if decomposed is not None:
        U, S, V = decomposed
        values = tuple(S.flatten().sort(descending=True).values.tolist())
        if len(S) == 1:
            kept = int((S[0] > NEGLIGIBLE * S[0].max()).sum()) if S.numel() else 0
            kept = min(kept, DIRECTIONS)
            left, right = U[0, :, :kept], V[0, :, :kept]
    layer, module = place_of(change.path)
    weight = change.weight
    return SiteFigures(
        path=change.path,
        layer=layer,
        module=module,
        rank=change.rank,
        norm=math.sqrt(sum(v * v for v in values)) if values else _norm(change),
        base_norm=None if weight is None else float(weight.norm()),
        values=values,
        left=left,
        right=right,
    )


def place_of(path: str) -> tuple[int | None, str]:
    """Layer and module of a path: the first index in it, and what comes behind it."""
    match = _LAYER.search(path)
    if match is None:
        return None, path
    rest = path[match.end() :].lstrip(".") or path[: match.start()]
    return int(match[1]), _LAYER.sub(lambda m: m[0].replace(m[1], "*"), rest)


def _decomposed(change: Change) -> tuple[Tensor, Tensor, Tensor] | None:
    """``U (n, out, r)``, ``σ (n, r)`` and ``V (n, in, r)``; None where it is too large to ask."""
    if change.factors is not None:
        a, b = change.factors
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            return None
        Qb, Rb = torch.linalg.qr(b)
        Qa, Ra = torch.linalg.qr(a.mT)
        u, S, vh = torch.linalg.svd(Rb @ Ra.mT, full_matrices=False)
        return Qb @ u, S, Qa @ vh.mT
    M = change.matrices()
    if min(M.shape[-2:]) > LARGEST_DENSE or not torch.isfinite(M).all():
        return None
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    return U, S, Vh.mT


def _norm(change: Change) -> float:
    if change.factors is None:
        return float(change.matrices().norm())
    a, b = (f.double() for f in change.factors)
    return math.sqrt(max(float(((b.mT @ b) * (a @ a.mT)).sum()), 0.0))
