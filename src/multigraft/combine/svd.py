"""The best pair of a given rank for the weighted sum of updates (Eckart and Young).

    Σ c_i B_i A_i = U S Vᵀ        B = U S, A = Vᵀ, cut to the rank

The sum's factors are known, so the dense product never is: with Bs = Q R and Asᵀ = P T (both thin),
Bs As = Q (R Tᵀ) Pᵀ, and only R Tᵀ, as small as the ranks together, is decomposed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from multigraft.combine.contract import RULES, Options, Rule
from multigraft.combine.linear import weighted_sum
from multigraft.combine.ranks import Rank, enough, left_out


class Cut(NamedTuple):
    """The best pairs of a rank for ``n`` matrices.

    Args:
        a, b: ``(n, rank, in)`` and ``(n, out, rank)``; each row of a has norm 1.
        error: the norm of what they miss, relative to that of the matrices; before any clamping.
    """

    a: Tensor
    b: Tensor
    error: float


def of_factors(a: Tensor, b: Tensor, rank: Rank, options: Options) -> Cut:
    """The best pair of this rank for ``b a``, from a ``(n, R, in)`` and b ``(n, out, R)``."""
    q, r = torch.linalg.qr(b)
    p, t = torch.linalg.qr(a.mT)
    u, s, vh = _decomposed(r @ t.mT, options)
    k = enough(s, rank)
    return _clamped(vh[:, :k] @ p.mT, q @ (u * s.unsqueeze(-2))[..., :k], s, options.clamp)


def of_matrix(M: Tensor, rank: Rank, options: Options) -> Cut:
    """The best pair of this rank for dense matrices ``(n, out, in)``."""
    u, s, vh = _decomposed(M, options)
    k = enough(s, rank)
    return _clamped(vh[:, :k], (u * s.unsqueeze(-2))[..., :k], s, options.clamp)


def _decomposed(M: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    driver = options.driver if M.is_cuda else None  # there is none to choose on a CPU
    u, s, vh = torch.linalg.svd(M, full_matrices=False, driver=driver)
    return u, s, vh


def _clamped(a: Tensor, b: Tensor, values: Tensor, quantile: float | None) -> Cut:
    """Both with the elements above the quantile of all, and below its negative, cut off."""
    error = left_out(values, a.shape[1])
    if quantile is None:
        return Cut(a, b, error)
    elements = torch.cat([b.flatten(1), a.flatten(1)], 1).sort(1).values
    # torch.quantile has a limit of 2^24 elements, which factors of large layers go beyond.
    at = quantile * (elements.shape[1] - 1)
    low, high = elements[:, int(at)], elements[:, min(int(at) + 1, elements.shape[1] - 1)]
    bound = torch.lerp(low, high, at - int(at))[:, None, None]
    return Cut(a.clamp(-bound, bound), b.clamp(-bound, bound), error)


RULES.register("svd", Rule("svd", weighted_sum, "stack", truncates=True))
