"""A few bits per weight, emulated: bitsandbytes' own values, and what packing gives back."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from multigraft.initialisations._quantise import dequantise, quantise, shapes


def weight(out: int = 24, in_: int = 128) -> Tensor:
    return torch.randn(out, in_, generator=torch.Generator().manual_seed(0))


def there_and_back(W: Tensor, bits: int) -> Tensor:
    codes, scales = quantise(W, bits)
    assert (codes.shape, scales.shape) == shapes(*W.shape, bits)
    assert codes.dtype == torch.uint8
    return dequantise(codes, scales, *W.shape, bits)


def test_four_bits_are_bitsandbytes_nf4() -> None:
    W = weight()
    data, state = bnb.quantize_4bit(W, blocksize=64, quant_type="nf4")
    codes, scales = quantise(W, 4)
    assert torch.equal(codes, data.flatten())
    assert torch.equal(scales, state.absmax)
    torch.testing.assert_close(
        there_and_back(W, 4), bnb.dequantize_4bit(data, state), atol=1e-6, rtol=0
    )


def test_eight_bits_are_bitsandbytes_int8() -> None:
    W = weight()
    data, scales, _ = bnb.int8_vectorwise_quant(W.half())
    codes, own = quantise(W, 8)
    assert torch.equal(codes.view(torch.int8).view(data.shape), data)
    assert torch.equal(own, scales)
    expected = bnb.int8_vectorwise_dequant(data, scales)
    torch.testing.assert_close(there_and_back(W, 8), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("bits", "error"), [(2, 0.7), (4, 0.1), (8, 0.01)])
@pytest.mark.parametrize("shape", [(24, 128), (5, 7), (1, 64), (3, 65)])
def test_what_is_lost_falls_with_the_bits(bits: int, error: float, shape: tuple[int, int]) -> None:
    W = weight(*shape)
    assert float((there_and_back(W, bits) - W).norm() / W.norm()) < error


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_levels_come_back_as_they_are_and_zero_is_one(bits: int) -> None:
    once = there_and_back(weight(), bits)
    torch.testing.assert_close(there_and_back(once, bits), once, atol=2e-3, rtol=0)
    assert not there_and_back(torch.zeros(2, 64), bits).any()
