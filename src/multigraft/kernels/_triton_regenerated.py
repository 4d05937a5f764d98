"""The Triton kernels of `multigraft.kernels.regenerated`, which is their specification.

Each program keeps its tile of the result in registers, in float32, and goes along the other axis.
What it reads of x is multiplied by the mask on the way, so x is read once and nothing else is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    """What one program of a kernel takes at a time, and with how many warps and stages."""

    tokens: int
    width: int
    warps: int
    stages: int


# The fastest of six each on an H200 (bench/gpu_products.py --tiles).
SHRINK = Tile(32, 128, 4, 4)
FACTOR = Tile(32, 128, 4, 4)
INPUT = Tile(64, 128, 4, 2)
SPLITS = 16
"""Parts of the tokens in dA: too few programs would fill the GPU without them."""


@triton.jit
def _kept(token, column, width, SEED, each, tokens, threshold):
    """Whether the elements of these tokens and columns are kept; ``each``: tokens of a row."""
    seed = tl.load(SEED + token // each, mask=token < tokens, other=0).to(tl.uint32)
    h = (token % each * width + column).to(tl.uint32) ^ seed
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return (h ^ (h >> 16)) >= threshold


@triton.jit
def _shrink(
    X, A, S, SEED, each, tokens, width, rank, threshold, scale,
    R: tl.constexpr, BT: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BT + tl.arange(0, BT))[:, None]
    r = tl.arange(0, R)[:, None]
    limit = threshold.to(tl.uint32)
    total = tl.zeros((BT, R), tl.float32)
    for start in range(0, width, BW):
        column = (start + tl.arange(0, BW))[None, :]
        inside = (row < tokens) & (column < width)
        x = tl.load(X + row * width + column, mask=inside, other=0.0)
        kept = _kept(row, column, width, SEED, each, tokens, limit)
        x = tl.where(kept, x, 0.0).to(X.dtype.element_ty)
        a = tl.load(A + r * width + column, mask=(r < rank) & (column < width), other=0.0)
        total = tl.dot(x, tl.trans(a), total, input_precision="ieee")
    r = tl.arange(0, R)[None, :]
    s = (total * scale).to(S.dtype.element_ty)
    tl.store(S + row * rank + r, s, mask=(row < tokens) & (r < rank))


@triton.jit
def _factor_gradient(
    DS, X, PARTS, SEED, each, tokens, width, rank, threshold, scale, share,
    R: tl.constexpr, BT: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    column = (tl.program_id(0) * BW + tl.arange(0, BW))[None, :]
    r = tl.arange(0, R)[None, :]
    limit = threshold.to(tl.uint32)
    total = tl.zeros((R, BW), tl.float32)
    first = tl.program_id(1) * share
    for start in range(first, min(first + share, tokens), BT):
        row = (start + tl.arange(0, BT))[:, None]
        here = (row < tokens) & (row < first + share)
        x = tl.load(X + row * width + column, mask=here & (column < width), other=0.0)
        kept = _kept(row, column, width, SEED, each, tokens, limit)
        x = tl.where(kept, x, 0.0).to(X.dtype.element_ty)
        ds = tl.load(DS + row * rank + r, mask=here & (r < rank), other=0.0)
        total = tl.dot(tl.trans(ds), x, total, input_precision="ieee")
    r = tl.arange(0, R)[:, None]
    place = (tl.program_id(1) * rank + r) * width + column
    tl.store(PARTS + place, total * scale, mask=(r < rank) & (column < width))


@triton.jit
def _input_gradient(
    DS, A, DX, SEED, each, tokens, width, rank, threshold, scale,
    R: tl.constexpr, BT: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BT + tl.arange(0, BT))[:, None]
    column = (tl.program_id(1) * BW + tl.arange(0, BW))[None, :]
    r = tl.arange(0, R)
    limit = threshold.to(tl.uint32)
    mine = (row < tokens) & (r[None, :] < rank)
    ds = tl.load(DS + row * rank + r[None, :], mask=mine, other=0.0)
    theirs = (r[:, None] < rank) & (column < width)
    a = tl.load(A + r[:, None] * width + column, mask=theirs, other=0.0)
    dx = tl.dot(ds, a, input_precision="ieee") * scale
    kept = _kept(row, column, width, SEED, each, tokens, limit)
    dx = tl.where(kept, dx, 0.0).to(DX.dtype.element_ty)
    tl.store(DX + row * width + column, dx, mask=(row < tokens) & (column < width))


def shrink(x: Tensor, A: Tensor, seed: Tensor, threshold: int, scale: float) -> Tensor:
    """``x̂ Aᵀ``, ``(tokens, rank)``."""
    x, A = x.contiguous(), A.contiguous()
    (tokens, width), rank = x.shape, A.shape[0]
    s = x.new_empty(tokens, rank)
    _shrink[(triton.cdiv(tokens, SHRINK.tokens),)](
        x, A, s, seed, tokens // len(seed), tokens, width, rank, threshold, scale,
        R=_tile(rank), **_options(SHRINK),
    )  # fmt: skip
    return s


def factor_gradient(ds: Tensor, x: Tensor, seed: Tensor, threshold: int, scale: float) -> Tensor:
    """``dSᵀ x̂``, ``(rank, in)``; the parts of the tokens are added up in a fixed order."""
    ds, x = ds.contiguous(), x.contiguous()
    (tokens, width), rank = x.shape, ds.shape[1]
    share = triton.cdiv(triton.cdiv(tokens, SPLITS), FACTOR.tokens) * FACTOR.tokens
    parts = torch.empty(SPLITS, rank, width, dtype=torch.float32, device=x.device)
    _factor_gradient[(triton.cdiv(width, FACTOR.width), SPLITS)](
        ds, x, parts, seed, tokens // len(seed), tokens, width, rank, threshold, scale, share,
        R=_tile(rank), **_options(FACTOR),
    )  # fmt: skip
    return parts.sum(0).to(ds.dtype)


def input_gradient(ds: Tensor, A: Tensor, seed: Tensor, threshold: int, scale: float) -> Tensor:
    """``keep ∘ (dS A) · scale``, ``(tokens, in)``."""
    ds, A = ds.contiguous(), A.contiguous()
    (tokens, rank), width = ds.shape, A.shape[1]
    dx = ds.new_empty(tokens, width)
    _input_gradient[(triton.cdiv(tokens, INPUT.tokens), triton.cdiv(width, INPUT.width))](
        ds, A, dx, seed, tokens // len(seed), tokens, width, rank, threshold, scale,
        R=_tile(rank), **_options(INPUT),
    )  # fmt: skip
    return dx


def _options(tile: Tile) -> dict[str, int]:
    return {
        "BT": tile.tokens,
        "BW": tile.width,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _tile(rank: int) -> int:
    """The rank as a tile of Triton's products."""
    return max(16, triton.next_power_of_2(rank))
