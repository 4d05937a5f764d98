"""Products with an input after a dropout whose mask is never stored: it is computed again.

    x̂ = keep(seed) ∘ x / (1 - p)    s = x̂ Aᵀ    dA = dSᵀ x̂    dX = keep(seed) ∘ (dS A) / (1 - p)

x: (tokens, in)   A: (rank, in)   s, dS: (tokens, rank)   seed: (1,), an integer on x's device

An element is kept or dropped by a hash of its index and the seed, so that every pass over x finds
the same ones, and none writes or reads x̂ or a mask. On CUDA these are Triton kernels; elsewhere,
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
WORD = 0xFFFFFFFF


def draw_seed(x: Tensor) -> Tensor:
    """A seed from the generator of the input's device; nothing waits for it."""
    return torch.randint(LARGEST - 1, (1,), device=x.device, dtype=torch.int32)


def can_regenerate(x: Tensor, rank: int) -> bool:
    """Whether the kernels take this input and so many columns of s."""
    return x.is_cuda and x.numel() < LARGEST and rank <= MOST_RANK and _kernels() is not None


def keeps(seed: Tensor, tokens: int, width: int, p: float) -> Tensor:
    """Which elements are kept, ``(tokens, width)``."""
    index = torch.arange(tokens * width, device=seed.device)
    h = index ^ seed.long()
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & WORD
    h = ((h ^ (h >> 15)) * 0x846CA68B) & WORD
    return ((h ^ (h >> 16)) >= _threshold(p)).view(tokens, width)


def dropped_input(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """``x̂``, of the shape of ``x``."""
    mask = keeps(seed, x.numel() // x.shape[-1], x.shape[-1], p).view(x.shape)
    return x * mask * (1.0 / (1.0 - p))


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
    return round(p * 2**32)


@cache
def _kernels() -> Any:
    """The Triton kernels, or None where there is no Triton."""
    try:
        from multigraft.kernels import _triton_regenerated
    except ImportError:
        return None
    return _triton_regenerated
