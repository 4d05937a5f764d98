"""Intruder dimensions: strong directions of a fine-tuned weight that its base did not have.

    u_j, one of the k leading left singular vectors of W + ΔW, intrudes if
    max_i |cos(u_j, w_i)| < ε   over all left singular vectors w_i of W

Paper: Shuttleworth et al. 2024, arXiv:2410.21228. Singular vectors have no sign, hence the absolute
value.
"""

from __future__ import annotations

import torch
from torch import Tensor

K = 10
EPSILON = 0.5
LARGEST = 1024
"""The smaller side of a weight up to which it is decomposed; the cost grows with its cube."""


def count_intruders(
    W: Tensor, delta: Tensor, *, k: int = K, epsilon: float = EPSILON, largest: int = LARGEST
) -> int | None:
    """How many intruder dimensions a change brings, summed over the matrices.

    Args:
        W: the base's weight ``(pairs, out, in)``.
        delta: what is added to it, of the same shape.

    Returns:
        None where the matrices are larger than ``largest``, or not finite.
    """
    if min(W.shape[-2:]) > largest or not (torch.isfinite(W).all() and torch.isfinite(delta).all()):
        return None
    known = _left(W)
    leading = _left(W + delta)[..., : min(k, known.shape[-1])]
    nearest = (known.mT @ leading).abs().amax(dim=-2)
    return int((nearest < epsilon).sum())


def _left(M: Tensor) -> Tensor:
    """Left singular vectors ``(…, out, min(out, in))``, the strongest first."""
    return torch.linalg.svd(M, full_matrices=False)[0]
