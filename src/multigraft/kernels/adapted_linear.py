"""A frozen linear layer and a low-rank pair on it, as one node of the graph.

    y  = x Wᵀ + b + scale · s Bᵀ          s  = x Aᵀ
    dS = scale · dY B      dX = dY W + dS A      dA = dSᵀ x      dB = scale · dYᵀ s

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

from multigraft.kernels.node import Node

MANY_TOKENS = 1024
"""From so many tokens on, writing the narrow product first saves a pass over y."""


def adapted_linear_reference(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float | Tensor
) -> Tensor:
    """The specification, in plain operators."""
    return F.linear(x, W, bias) + F.linear(F.linear(x, A.to(x.dtype)) * scale, B.to(x.dtype))


def adapted_linear(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float | Tensor,
    seen: Tensor | None = None,
) -> Tensor:
    """``x Wᵀ + b + scale · (x Aᵀ) Bᵀ`` for a ``W`` and ``b`` that take no gradients.

    Args:
        scale: a number, or one for each column of the rank, ``(rank,)``.
        seen: what A sees in place of ``x``, of its shape: ``x`` after a dropout.
    """
    if A.dtype != x.dtype:
        A, B = A.to(x.dtype), B.to(x.dtype)
    if isinstance(scale, Tensor):
        # One scale a column: into the narrow factor, where autograd sees it.
        A, scale = A * scale[:, None], 1.0
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _forward(x, W, bias, A, B, scale, seen)[0]
    y: Tensor = _AdaptedLinear.apply(x, W, bias, A, B, scale, seen)[0]
    return y


def _forward(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    seen: Tensor | None,
) -> tuple[Tensor, Tensor]:
    flat = x.reshape(-1, x.shape[-1])
    s = torch.mm(flat if seen is None else seen.reshape(flat.shape), A.T)
    if flat.shape[0] < MANY_TOKENS:
        y = F.linear(flat, W, bias).addmm_(s, B.T, alpha=scale)
    else:
        own = _scaled(s, B.T, scale) if bias is None else torch.addmm(bias, s, B.T, alpha=scale)
        y = own.addmm_(flat, W.T)
    return y.view(*x.shape[:-1], W.shape[0]), s


def _scaled(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """``scale · left right`` in one product: what is added to it is nothing, and never read."""
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scale)


class _AdaptedLinear(Node):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return _forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, W, _, A, B, ctx.scale, seen = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.is_apart = seen is not None
        ctx.save_for_backward(x if seen is None else seen, W, A, B, output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        seen, W, A, B, s = ctx.saved_tensors
        dy = grads[0].reshape(-1, W.shape[0])
        # The narrow side first: several times faster on a CPU than the same product transposed.
        ds = _scaled(B.T, dy.T, ctx.scale)
        needs_x, _, _, needs_A, needs_B, _, needs_seen = ctx.needs_input_grad
        dx = dseen = None
        if needs_x and ctx.is_apart:
            dx = torch.mm(dy, W).view(seen.shape)
        elif needs_x:
            dx = torch.mm(ds.T, A).addmm_(dy, W).view(seen.shape)
        if needs_seen:
            dseen = torch.mm(ds.T, A).view(seen.shape)
        dA = torch.mm(ds, seen.reshape(-1, seen.shape[-1])) if needs_A else None
        dB = _scaled(s.T, dy, ctx.scale).T if needs_B else None
        return dx, None, None, dA, dB, None, dseen
