"""Frozen layers that read one input, each with a low-rank pair and a length for each feature.

    y_i  = g_i ∘ u_i + b_i     u_i = x W_iᵀ + scale_i · s_i B_iᵀ     [s_1 … s_k] = x [A_1 … A_k]ᵀ
    g_i  = m_i / n_i           dm_i = Σ_tokens dY_i ∘ u_i / n_i
    dS_i = scale_i · dY_i (g_i ∘ B_i)      dB_i = scale_i · g_i ∘ dY_iᵀ s_i
    dX   = [dS_1 … dS_k] [A_1 … A_k] + Σ dY_i (g_i ∘ W_i)      dA_i = dS_iᵀ x

x: (..., in)   W: (out, in)   b: (out,)   A: (rank, in)   B: (out, rank)   m, n: (out,)

All are one node, in the order of `adapted_linears`. n is a constant to all gradients. g goes onto
the smaller of W and what it is multiplied with. Saved are x, s and tensors as wide as y: u, or on a
CPU y, which others often keep as well. Somebody may write to y meanwhile; its count of changes
tells, and u is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from multigraft.kernels.node import Node
from multigraft.kernels.products import begun, thin

SIZE = 5
"""Tensors of a layer among the node's inputs."""
WIDE = 2
"""From so many times as many tokens as features on, g goes onto W in the forward pass too."""


class Norm(Protocol):
    """What gives n, which gets no gradients."""

    def kept(self) -> Tensor | None:
        """n, if it was computed before and still holds."""

    def __call__(self, product: Tensor | None = None) -> Tensor:
        """N.

        Args:
            product: ``A Wᵀ`` if it is at hand, ``(rank, out)``.
        """


class Reweighted(NamedTuple):
    """One of the layers.

    Args:
        W, bias: frozen.
        m: the magnitude, which gets gradients.
        norm: gives n. Where it is not kept, the product that it needs is taken along with x's.
    """

    W: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scale: float
    m: Tensor
    norm: Norm


def reweighted_linear_reference(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    m: Tensor,
    norm: Norm,
) -> Tensor:
    """The specification, in plain operators, for one layer."""
    u = F.linear(x, W) + F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype)) * scale
    y = u * (m / norm())
    return (y if bias is None else y + bias).to(x.dtype)


def reweighted_linears(x: Tensor, parts: Sequence[Reweighted]) -> list[Tensor]:
    """``(m / n) ∘ (x Wᵀ + scale · (x Aᵀ) Bᵀ) + b`` for each of these layers."""
    tensors: list[Tensor | None] = []
    for part in parts:
        tensors += (part.W, part.bias, part.A.to(x.dtype), part.B.to(x.dtype), part.m)
    how = tuple([(part.scale, part.norm) for part in parts])
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        ys: Sequence[Tensor] = _forward(x, how, tensors, False)[: len(parts)]
    else:
        ys = _ReweightedLinears.apply(x, how, *tensors)[: len(parts)]
    # Viewed out here: what a node gives as a view, nobody may write to.
    return [y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1]) for y in ys]


def _forward(
    x: Tensor, how: Sequence[tuple[float, Norm]], tensors: Sequence[Tensor | None], is_told: bool
) -> tuple[Tensor, ...]:
    """Each layer's y, then s, each layer's g and n, and, unless y tells them, each layer's u."""
    flat = x.reshape(-1, x.shape[-1])
    s, columns = _narrow(flat, tensors)
    longer = _Longer(flat)
    ys, gs, ns, us = [], [], [], []
    for i, (scale, norm) in enumerate(how):
        W, bias, A, B, m = tensors[i * SIZE : (i + 1) * SIZE]
        assert W is not None and A is not None and B is not None and m is not None
        own = s.narrow(1, *columns[i])
        if is_told and len(flat) >= WIDE * W.shape[1]:
            g = m / (n := norm())
            y = begun(bias, own, (B * g[:, None]).T, scale).addmm_(flat, (W * g[:, None]).T)
        else:
            kept = norm.kept() if is_told else None
            if is_told and kept is None:
                u, product = longer.products(own, A, B, scale, W)
                n = norm(product)
            else:
                u = begun(None, own, B.T, scale).addmm_(flat, W.T)
                n = norm() if kept is None else kept
            g = m / n
            y = _weighed(u, g, bias, is_told)
            us += [] if is_told else [u]
        ys.append(y.to(x.dtype))
        gs.append(g)
        ns.append(n)
    return *ys, s, *gs, *ns, *us


def _weighed(u: Tensor, g: Tensor, bias: Tensor | None, in_place: bool) -> Tensor:
    """``g ∘ u + b``."""
    if in_place:
        return u.mul_(g) if bias is None else u.mul_(g).add_(bias)
    return u * g if bias is None else torch.addcmul(bias.to(g.dtype), u.to(g.dtype), g)


class _Longer:
    """The input with room for a layer's A after its rows: one product then is x's and A's with W.

    By itself A's would read W for a few rows, and take a fifth of the time that x's takes.
    """

    def __init__(self, flat: Tensor) -> None:
        self.flat = flat
        self.rows: Tensor | None = None

    def products(
        self, s: Tensor, A: Tensor, B: Tensor, scale: float, W: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``x Wᵀ + scale · s Bᵀ`` and ``A Wᵀ``."""
        tokens, size = len(self.flat), len(self.flat) + len(A)
        if self.rows is None or len(self.rows) < size:
            self.rows = torch.cat([self.flat, A])
        else:
            self.rows[tokens:size] = A
        both = s.new_empty(size, W.shape[0])
        torch.addmm(both[:1], s, B.T, beta=0, alpha=scale, out=both[:tokens])
        both[tokens:].zero_()
        both.addmm_(self.rows[:size], W.T)
        # No view: nobody may write to what a node gives as one.
        own = both[:tokens]
        u = both.new_empty(0).set_(both.untyped_storage(), 0, own.shape, own.stride())
        return u, both[tokens:]


def _narrow(flat: Tensor, tensors: Sequence[Tensor | None]) -> tuple[Tensor, list[tuple[int, int]]]:
    """s, and where each layer's columns begin in it and how many they are."""
    As = _stacked(tensors)
    ranks = [A.shape[0] for A in As]
    starts = [sum(ranks[:i]) for i in range(len(ranks))]
    A = As[0] if len(As) == 1 else torch.cat(As)
    return thin(flat, A.T, 1.0), list(zip(starts, ranks, strict=True))


def _stacked(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [A for A in tensors[2::SIZE] if A is not None]


def _tells_u(x: Tensor, tensors: Sequence[Tensor | None]) -> bool:
    """Whether y will do in u's place: it is precise, and no feature of it is multiplied by zero.

    Elsewhere than on a CPU the answer would have to be waited for.
    """
    is_plain = x.device.type == "cpu" and not torch._C._are_functorch_transforms_active()
    return (
        is_plain
        and x.dtype.itemsize >= 4
        and all(bool(m.all()) for m in tensors[SIZE - 1 :: SIZE] if m is not None)
    )


class _ReweightedLinears(Node):
    """Outputs: see `_forward`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, how: tuple[tuple[float, Norm], ...], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        return _forward(x, how, tensors, _tells_u(x, tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, ctx.how, *tensors = inputs
        k = len(ctx.how)
        ys, inner, us = output[:k], output[k : 3 * k + 1], output[3 * k + 1 :]
        ctx.mark_non_differentiable(*output[k:])
        ctx.set_materialize_grads(False)  # of u: zeros as wide as y
        ctx.seen = [] if us else [_Seen(y) for y in ys]
        # Not y itself: autograd would refuse the backward pass once somebody has written to it.
        ctx.save_for_backward(x, *tensors, *inner, *(us or [y.data for y in ys]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        k = len(ctx.how)
        x, *more = ctx.saved_tensors
        tensors, s, gs = more[: SIZE * k], more[SIZE * k], more[SIZE * k + 1 :][:k]
        ns, us = more[-2 * k : -k], more[-k:]
        is_told = bool(ctx.seen)
        if torch.is_grad_enabled() or any(seen.is_changed for seen in ctx.seen):
            # To autograd, what was kept is no function of the inputs, as second gradients need it.
            how = [(scale, _Kept(n)) for (scale, _), n in zip(ctx.how, ns, strict=True)]
            again = _forward(x, how, tensors, False)
            s, gs, us, is_told = again[k], [*again[k + 1 : 2 * k + 1]], [*again[-k:]], False
        flat = x.reshape(-1, x.shape[-1])
        needs_x, _, *needs = ctx.needs_input_grad
        found: list[Tensor | None] = [None] * len(tensors)
        dss, dx, start = [], None, 0
        for i, (scale, _) in enumerate(ctx.how):
            (_, bias, A, B, m), g = tensors[i * SIZE : (i + 1) * SIZE], gs[i]
            dy, rank = grads[i], A.shape[0]
            own, start = s.narrow(1, start, rank), start + rank
            if dy is None:
                dss.append(s.new_zeros(len(flat), rank))
                continue
            factor = g.to(dy.dtype)[:, None]
            dss.append(thin(dy, B * factor, scale))
            if needs[i * SIZE + 3]:
                found[i * SIZE + 3] = thin(dy.T, own, scale) * factor
            if needs[i * SIZE + 4]:
                dm = _over_tokens(dy, us[i], g)
                dm = dm if bias is None or not is_told else dm - bias * dy.sum(0)
                found[i * SIZE + 4] = dm / (m if is_told else ns[i])
        ds = dss[0] if k == 1 else torch.cat([part.T for part in dss]).T
        if needs_x:
            As = _stacked(tensors)
            dx = torch.mm(ds, As[0] if k == 1 else torch.cat(As))
            for W, g, dy in zip(tensors[::SIZE], gs, grads, strict=False):
                dx = dx if dy is None else _accumulated(dx, dy, W, g)
            dx = dx.view(x.shape)
        start = 0
        whole = torch.mm(ds.T, flat) if any(needs[2::SIZE]) else None
        for i, A in enumerate(_stacked(tensors)):
            if whole is not None and needs[i * SIZE + 2] and grads[i] is not None:
                found[i * SIZE + 2] = whole.narrow(0, start, A.shape[0])
            start += A.shape[0]
        return dx, None, *found


class _Kept(NamedTuple):
    """A norm that is there."""

    n: Tensor

    def kept(self) -> Tensor:
        return self.n

    def __call__(self, product: Tensor | None = None) -> Tensor:
        return self.n


def _accumulated(dx: Tensor, dy: Tensor, W: Tensor, g: Tensor) -> Tensor:
    """``dX + dY (g ∘ W)``; what is narrower than float32 is not rounded twice in W."""
    if len(dy) >= W.shape[1] and W.dtype.itemsize >= 4:
        return dx.addmm_(dy, W * g.to(W.dtype)[:, None])
    return dx.addmm_((dy * g).to(dy.dtype), W)


def _over_tokens(dy: Tensor, u: Tensor, g: Tensor) -> Tensor:
    """``Σ_tokens dY ∘ u`` ``(out,)``.

    On a CPU the gradient of a layer norm's weight is that sum, in one pass and without a temporary.
    """
    is_plain = dy.device.type == "cpu" and not torch._C._are_functorch_transforms_active()
    if not is_plain or torch.is_grad_enabled() or not dy.dtype == u.dtype == g.dtype:
        return (dy * u).sum(0, dtype=g.dtype)
    mean, rstd = dy.new_zeros(len(dy), 1), dy.new_ones(len(dy), 1)
    found: Tensor = torch.ops.aten.native_layer_norm_backward(
        dy, u, [dy.shape[1]], mean, rstd, g, g, [False, True, False]
    )[1]
    return found


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
