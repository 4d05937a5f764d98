"""A frozen linear layer, a low-rank pair on it and a factor for each output feature, as one node.

    y  = g ∘ u + b                  u  = x Wᵀ + scale · s Bᵀ,   s = x Aᵀ,   g = m / n
    dU = g ∘ dY     dm = Σ_tokens dY ∘ u / n
    dS = scale · dU B      dX = dU W + dS A      dA = dSᵀ x      dB = scale · dUᵀ s

x: (..., in)   W: (out, in)   b: (out,)   A: (rank, in)   B: (out, rank)   m, n: (out,)

n is a constant to all gradients. Saved are x, s and one tensor as wide as y: u, or on a CPU y,
which lies where u lay and which others often keep as well. Somebody may write to y meanwhile; its
count of changes tells, and u is computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multigraft.kernels.node import Node

MANY_TOKENS = 1024
"""From so many tokens on, writing the narrow product first saves a pass over u."""


def reweighted_linear_reference(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    m: Tensor,
    norm: Callable[[], Tensor],
) -> Tensor:
    """The specification, in plain operators."""
    u = F.linear(x, W) + F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype)) * scale
    y = u * (m / norm().detach())
    return (y if bias is None else y + bias).to(x.dtype)


def reweighted_linear(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    m: Tensor,
    norm: Callable[[], Tensor],
) -> Tensor:
    """``(m / n) ∘ (x Wᵀ + scale · (x Aᵀ) Bᵀ) + b`` for a ``W`` and ``b`` without gradients.

    Args:
        m: the magnitude, which gets gradients.
        norm: gives n, which gets none. It is asked once x W is computed: where it reads W too, W
            is in the processor's cache then.
    """
    if A.dtype != x.dtype:
        A, B = A.to(x.dtype), B.to(x.dtype)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        u, _ = _product(x, W, A, B, scale)
        y = _scaled(u, m / norm(), bias)
    else:
        y = _ReweightedLinear.apply(x, W, bias, A, B, scale, m, norm)[0]
    # Viewed out here: what a node gives as a view, nobody may write to.
    return y if x.dim() == 2 else y.view(*x.shape[:-1], W.shape[0])


def _product(x: Tensor, W: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``x Wᵀ + scale · s Bᵀ`` and ``s``, both with a row for each token."""
    flat = x.reshape(-1, x.shape[-1])
    s = torch.mm(flat, A.T)
    if flat.shape[0] < MANY_TOKENS:
        return torch.mm(flat, W.T).addmm_(s, B.T, alpha=scale), s
    nothing = s.new_empty(())  # never read
    return torch.addmm(nothing, s, B.T, beta=0, alpha=scale).addmm_(flat, W.T), s


def _scaled(u: Tensor, g: Tensor, bias: Tensor | None) -> Tensor:
    y = u * g if bias is None else torch.addcmul(bias.to(g.dtype), u.to(g.dtype), g)
    return y.to(u.dtype)


def _tells_u(y: Tensor, m: Tensor) -> bool:
    """Whether y will do in u's place: it is precise, and no feature of it is multiplied by zero.

    Elsewhere than on a CPU the answer would have to be waited for.
    """
    is_plain = y.device.type == "cpu" and not torch._C._are_functorch_transforms_active()
    return is_plain and y.dtype.itemsize >= 4 and bool(m.all())


class _ReweightedLinear(Node):
    """Outputs: y, s, g, n, and u where y does not tell it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        W: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
        m: Tensor,
        norm: Callable[[], Tensor],
    ) -> tuple[Tensor, ...]:
        u, s = _product(x, W, A, B, scale)
        n = norm()
        g = m / n
        if not _tells_u(u, m):
            return _scaled(u, g, bias), s, g, n, u
        y = u.mul_(g)
        return y if bias is None else y.add_(bias), s, g, n

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, W, bias, A, B, ctx.scale, m, _ = inputs
        y, s, g, n, *u = output
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # of u: zeros as wide as y
        ctx.seen = None if u else _Seen(y)
        # Not y itself: autograd would refuse the backward pass once somebody has written to it.
        ctx.save_for_backward(x, W, bias, A, B, m, s, g, n, *(u or (y.data,)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, W, bias, A, B, m, s, g, n, wide = ctx.saved_tensors
        is_changed = ctx.seen is not None and ctx.seen.is_changed
        if torch.is_grad_enabled() or is_changed:
            # To autograd, what was kept is no function of the inputs, as second gradients need it.
            (u, s), g = _product(x, W, A, B, ctx.scale), m / n
        else:
            u = wide
        dy = grads[0]
        needs_x, _, _, needs_A, needs_B, _, needs_m, _ = ctx.needs_input_grad
        dx = dA = dB = dm = own = None
        if needs_m:
            own = dy * u
            dm = own.sum(0, dtype=g.dtype)
            if u is wide and ctx.seen is not None:
                dm = (dm if bias is None else dm - bias * dy.sum(0)) / m
            else:
                dm = dm / n
        if own is None or torch.is_grad_enabled():
            du = (dy * g).to(dy.dtype)
        else:
            du = torch.mul(dy, g, out=own)
        # Narrow products with the narrow side first: several times faster on a CPU.
        ds = torch.mm(B.T, du.T) * ctx.scale
        if needs_x:
            dx = torch.mm(ds.T, A).addmm_(du, W).view(x.shape)
        if needs_A:
            dA = torch.mm(ds, x.reshape(-1, x.shape[-1]))
        if needs_B:
            dB = (torch.mm(s.T, du) * ctx.scale).T
        return dx, None, None, dA, dB, None, dm, None


class _Seen:
    """A tensor's count of changes, without its memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.twin = tensor.detach()  # which has the same count
        self.twin.data = tensor.new_empty(0)
        self.count = self.twin._version

    @property
    def is_changed(self) -> bool:
        """Whether somebody has written to the tensor since."""
        return bool(self.twin._version != self.count)
