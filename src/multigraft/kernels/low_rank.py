"""``y + scale · (x Aᵀ) Bᵀ`` for a linear layer, without an ``out``-wide temporary.

x: (..., in)   A: (rank, in)   B: (out, rank)   y: (..., out)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def low_rank_add_reference(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """The specification, in plain operators."""
    return y + F.linear(F.linear(x, A), B) * scale


def low_rank_add(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """``y + scale · (x Aᵀ) Bᵀ``; ``A`` and ``B`` are cast to the input's dtype, never ``x``.

    Under autocast the operators choose the dtype; the result has that of ``y``.
    """
    h = F.linear(x, A.to(x.dtype))
    if h.dtype != y.dtype:
        # A frozen layer upstream may give another dtype (autocast, float32 norms): a cast, r wide.
        h = h.to(y.dtype)
    # y + scale * h Bᵀ, scaled while it is accumulated:
    out = torch.addmm(
        y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1]), B.to(h.dtype).T, alpha=scale
    )
    return out.view(y.shape)
