"""A frozen linear layer and a low-rank pair on it, as one node of the graph.

    y  = x Wᵀ + b + s Bᵀ          s  = scale · x Aᵀ
    dS = scale · dY B             dX = dY W + dS A          dA = dSᵀ x        dB = dYᵀ s

x: (..., in)   W: (out, in)   b: (out,)   A: (rank, in)   B: (out, rank)   s: (..., rank)

The narrow product comes first and the base's accumulates onto it, forwards and backwards, so that
nothing as wide as y or x is written to be added afterwards: autograd alone would also add the two
parts of dX. Saved are x and s; A and B are cast to x's dtype, never x to theirs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def adapted_linear_reference(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float | Tensor
) -> Tensor:
    """The specification, in plain operators."""
    return F.linear(x, W, bias) + F.linear(F.linear(x, A.to(x.dtype)) * scale, B.to(x.dtype))


def adapted_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float | Tensor
) -> Tensor:
    """``x Wᵀ + b + scale · (x Aᵀ) Bᵀ`` for a ``W`` and ``b`` that take no gradients.

    Args:
        scale: a number, or one for each column of the rank, ``(rank,)``.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _forward(x, W, bias, A.to(x.dtype), B.to(x.dtype), scale)[0]
    y: Tensor = _AdaptedLinear.apply(x, W, bias, A.to(x.dtype), B.to(x.dtype), scale)[0]
    return y


def _forward(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float | Tensor
) -> tuple[Tensor, Tensor]:
    flat = x.reshape(-1, x.shape[-1])
    s = F.linear(flat, A) * scale
    own = F.linear(s, B, bias)
    return torch.addmm(own, flat, W.T).view(*x.shape[:-1], W.shape[0]), s


class _AdaptedLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return _forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, W, _, A, B, scale = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, W, A, B, output[1], scale if isinstance(scale, Tensor) else None)
        ctx.scale = scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, W, A, B, s, scales = ctx.saved_tensors
        dy = grads[0].reshape(-1, W.shape[0])
        ds = (dy @ B) * (ctx.scale if scales is None else scales)
        needs_x, _, _, needs_A, needs_B, _ = ctx.needs_input_grad
        dx = torch.addmm(ds @ A, dy, W).view(x.shape) if needs_x else None
        dA = ds.T @ x.reshape(-1, x.shape[-1]) if needs_A else None
        dB = dy.T @ s if needs_B else None
        return dx, None, None, dA, dB, None
