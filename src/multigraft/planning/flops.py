"""Floating-point operations of an operator, from the sizes of what it is given.

Products and attention count, as torch's own counter counts them: two for each pair of numbers that
are multiplied and added. What is done element by element costs time by its bytes, not by these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def flops_of(func: Any, args: Sequence[Any], found: Any) -> int:
    """Of one call; 0 for what is no product."""
    count = COUNTS.get(func._overloadpacket)
    return 0 if count is None else count(args, found)


def _product(left: Tensor, right: Tensor) -> int:
    """Of matrices, or as many pairs of them."""
    return 2 * left.numel() * right.shape[-1]


def _attention(args: Sequence[Any], _: Any) -> int:
    """Q kᵀ, and the weights times v."""
    q, k, v = args[:3]
    pairs = q.shape[:-1].numel() * k.shape[-2]
    return 2 * int(pairs) * (q.shape[-1] + v.shape[-1])


def _attention_backward(args: Sequence[Any], _: Any) -> int:
    """The weights once more, and four products for the gradients."""
    q, k, v = args[1:4]
    pairs = q.shape[:-1].numel() * k.shape[-2]
    return 2 * int(pairs) * (3 * q.shape[-1] + 2 * v.shape[-1])


def _grouped(args: Sequence[Any], found: Tensor) -> int:
    left, right = args[:2]
    return 2 * left.numel() * right.shape[-1]


def _convolution(args: Sequence[Any], found: Tensor) -> int:
    weight = args[1]
    return 2 * found.numel() * weight.numel() // weight.shape[0]


def _convolution_backward(args: Sequence[Any], found: Sequence[Tensor | None]) -> int:
    dy, weight, wanted = args[0], args[2], args[-1]
    once = 2 * dy.numel() * weight.numel() // weight.shape[0]
    return once * sum(wanted[:2])


COUNTS: dict[Any, Callable[[Sequence[Any], Any], int]] = {
    **{op: lambda args, _: _product(args[0], args[1]) for op in (aten.mm, aten.bmm)},
    **{
        op: lambda args, _: _product(args[1], args[2])
        for op in (aten.addmm, aten.addmm_, aten.baddbmm, aten.baddbmm_)
    },
    aten._grouped_mm: _grouped,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten.convolution: _convolution,
    aten.convolution_backward: _convolution_backward,
}
