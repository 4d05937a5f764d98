"""Weights in a few bits, in plain operators: NormalFloat in blocks, int8 in rows.

    4 and 2 bits   W ≈ level[q] * scale[block]    scale: the largest |w| of 64 along the rows
    8 bits         W ≈ q * scale[row] / 127       scale: the row's largest |w|

The levels are quantiles of the normal distribution, as many below zero as above it but for one more
above, and zero; bitsandbytes' nf4 has the same 16.

Papers: Dettmers et al. 2023, arXiv:2305.14314, section 3; 2022, arXiv:2208.07339, section 2.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 64
TAIL = 0.9677083  # the outermost quantile, (1 - 1/30 + 1 - 1/32) / 2 as in the paper's code


def shapes(out: int, in_: int, bits: int) -> tuple[tuple[int], tuple[int]]:
    """Shapes of the packed codes and of the scales of a weight ``(out, in)``."""
    if bits == 8:
        return (out * in_,), (out,)
    blocks = -(-out * in_ // BLOCK)
    return (blocks * BLOCK * bits // 8,), (blocks,)


def quantise(W: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes, packed as uint8, and float32 scales of a weight ``(out, in)``."""
    W = W.float()
    if bits == 8:
        W = W.half().float()  # as bitsandbytes has it before it quantises
        scales = W.abs().amax(1)
        codes = (W * (127 / scales.clamp_min(1e-30))[:, None]).round().to(torch.int8)
        return codes.flatten().view(torch.uint8), scales
    flat = W.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    levels = _levels(bits).to(W.device)
    middles = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(blocks / scales.clamp_min(1e-30)[:, None], middles).to(torch.uint8)
    parts = codes.view(-1, 8 // bits).unbind(1)
    packed = parts[0]
    for part in parts[1:]:
        packed = packed << bits | part
    return packed, scales


def dequantise(codes: Tensor, scales: Tensor, out: int, in_: int, bits: int) -> Tensor:
    """The weight ``(out, in)`` that these stand for, in float32."""
    if bits == 8:
        return codes.view(torch.int8).view(out, in_) * (scales.float() / 127)[:, None]
    values = torch.nn.functional.embedding(codes.int(), _of_bytes(bits).to(codes.device))
    blocks = values.view(-1, BLOCK) * scales.float()[:, None]
    return blocks.flatten()[: out * in_].view(out, in_)


@lru_cache(maxsize=4)
def _of_bytes(bits: int) -> Tensor:
    """The levels that each byte's codes stand for, ``(256, 8 / bits)``: one look-up for all."""
    every = torch.arange(256)
    codes = [every >> shift & (2**bits - 1) for shift in range(8 - bits, -1, -bits)]
    return _levels(bits)[torch.stack(codes, dim=1)]


@lru_cache(maxsize=4)
def _levels(bits: int) -> Tensor:
    """The ``2 ** bits`` levels between -1 and 1, ascending."""
    half = 2 ** (bits - 1)
    above = torch.special.ndtri(torch.linspace(TAIL, 0.5, half + 1, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(TAIL, 0.5, half, dtype=torch.float64)[:-1])
    levels = torch.cat([below, torch.zeros(1, dtype=torch.float64), above.flip(0)])
    return (levels / levels.abs().max()).float()
