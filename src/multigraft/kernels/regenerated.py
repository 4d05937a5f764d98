"""Products with an input after a dropout whose mask is never stored: it is computed again.

    x̂ = keep(seed) ∘ x / (1 - p)    s = x̂ Aᵀ    dA = dSᵀ x̂    dX = keep(seed) ∘ (dS A) / (1 - p)

x: (tokens, in)   A: (rank, in)   s, dS: (tokens, rank)   seed: (rows,), int32 on x's device

Tokens fall into rows of equal length. An element is kept or dropped by a hash of its row's seed and
its index in the row, so that every pass over x finds the same ones, and none writes or reads x̂ or a
mask; and what follows in a longer row changes nothing. On CUDA these are Triton kernels; elsewhere,
and as their specification, plain operators with the same result.

The hash is Wellons' lowbias32 (nullprogram.com/blog/2018/07/31), which is in the public domain.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

LARGEST = 2**31
"""Elements of an input that 32-bit indices can tell apart."""
MOST_RANK = 128
"""Above, the kernels' tiles leave no room for more."""
SIGN = -(2**31)


def draw_seed(x: Tensor) -> Tensor:
    """A seed from the generator of the input's device; nothing waits for it."""
    return torch.randint(LARGEST - 1, (1,), device=x.device, dtype=torch.int32)


def can_regenerate(x: Tensor, rank: int) -> bool:
    """Whether the kernels take this input and so many columns of s."""
    return x.is_cuda and x.numel() < LARGEST and rank <= MOST_RANK and _kernels() is not None


def keeps(seed: Tensor, tokens: int, width: int, p: float | Tensor) -> Tensor:
    """Which elements are kept, ``(tokens, width)``.

    Args:
        p: for all rows, or ``(rows,)`` in float64.
    """
    index = torch.arange(tokens // len(seed) * width, dtype=torch.int32, device=seed.device)
    h = scrambled(index ^ seed[:, None])
    # What is signed here is compared as if it were not.
    if isinstance(p, Tensor):
        limit = (p * 2**32).round().clamp(max=2**32 - 1).long() + SIGN
        kept = (h ^ SIGN) >= limit.int()[:, None]
    else:
        kept = (h ^ SIGN) >= _threshold(p) + SIGN
    return kept.view(tokens, width)


def scrambled(h: Tensor) -> Tensor:
    """The hash of each int32, in its place; shifts bring in zeros, and products wrap around."""
    h ^= (h >> 16) & 0xFFFF
    h *= 0x7FEB352D
    h ^= (h >> 15) & 0x1FFFF
    h *= 0x846CA68B - 2**32
    h ^= (h >> 16) & 0xFFFF
    return h


def dropped_input(x: Tensor, seed: Tensor, p: float | Tensor) -> Tensor:
    """``x̂``, of the shape of ``x``."""
    return masked_input(x, seed, p)[0]


def masked_input(
    x: Tensor, seed: Tensor, p: float | Tensor
) -> tuple[Tensor, Tensor, float | Tensor]:
    """``x̂`` and its mask, both of the shape of ``x``, and what kept elements are multiplied by.

    Args:
        x: its first axis in as many equal parts as there are seeds.
    """
    mask = keeps(seed, x.numel() // x.shape[-1], x.shape[-1], p).view(x.shape)
    if not isinstance(p, Tensor):
        scale: float | Tensor = 1.0 / (1.0 - p)
        return x * mask * scale, mask, scale
    wide = torch.promote_types(x.dtype, torch.float32)
    scale = (1.0 / (1.0 - p)).to(wide).repeat_interleave(x.shape[0] // len(p))
    scale = scale.view(-1, *(1,) * (x.dim() - 1))
    return (x * mask * scale).to(x.dtype), mask, scale


def dropped_shrink(x: Tensor, A: Tensor, seed: Tensor, p: float) -> Tensor:
    """``x̂ Aᵀ``, ``(tokens, rank)``."""
    own = _kernels() if x.is_cuda else None
    if own is None:
        return torch.mm(dropped_input(x, seed, p), A.T)
    s: Tensor = own.shrink(x, A, seed, _threshold(p), 1.0 / (1.0 - p))
    return s


def dropped_factor_gradient(ds: Tensor, x: Tensor, seed: Tensor, p: float) -> Tensor:
    """``dSᵀ x̂``, ``(rank, in)``."""
    own = _kernels() if x.is_cuda else None
    if own is None:
        return torch.mm(ds.T, dropped_input(x, seed, p))
    dA: Tensor = own.factor_gradient(ds, x, seed, _threshold(p), 1.0 / (1.0 - p))
    return dA


def dropped_input_gradient(ds: Tensor, A: Tensor, seed: Tensor, p: float) -> Tensor:
    """``keep ∘ (dS A) / (1 - p)``, ``(tokens, in)``."""
    own = _kernels() if ds.is_cuda else None
    if own is None:
        return dropped_input(torch.mm(ds, A), seed, p)
    dx: Tensor = own.input_gradient(ds, A, seed, _threshold(p), 1.0 / (1.0 - p))
    return dx


def _threshold(p: float) -> int:
    return min(round(p * 2**32), 2**32 - 1)


@cache
def _kernels() -> Any:
    """The Triton kernels, or None where there is no Triton."""
    try:
        from multigraft.kernels import _triton_regenerated
    except ImportError:
        return None
    return _triton_regenerated
