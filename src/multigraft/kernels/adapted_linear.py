"""Frozen linear layers that read one input, with low-rank pairs on each, as one node of the graph.

    y_i  = x W_iᵀ + b_i + scale_i · s_i B_iᵀ        [s_1 … s_k] = x [A_1 … A_k]ᵀ
    dS_i = scale_i · dY_i B_i      dA_i = dS_iᵀ x      dB_i = scale_i · dY_iᵀ s_i
    dX   = [dS_1 … dS_k] [A_1 … A_k] + Σ dY_i W_i

x: (..., in)   W: (out, in)   b: (out,)   A: (rank, in)   B: (out, rank)   s: (..., rank)

Several adapters take equal shares of the rows, the first one's first; then the pairs' products are
batched over them. The narrow product comes first and the base's accumulates onto it, forwards and
backwards, so that nothing as wide as y or x is written to be added afterwards: autograd alone would
add up the parts of dX. Saved are x, once for all layers, and s; A and B are cast to x's dtype,
never x to theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from multigraft.kernels.layout import Layout, Part, Stack, layout_for
from multigraft.kernels.node import IS_TRACED, Node
from multigraft.kernels.products import begun, product, thin
from multigraft.kernels.regenerated import (
    dropped_factor_gradient,
    dropped_input,
    dropped_input_gradient,
    dropped_shrink,
    keeps,
)


class Dropped(NamedTuple):
    """What the factors see in place of the input: it after a dropout.

    Args:
        x: of the input's shape.
        mask: what was kept, or None where ``x`` is to get a gradient of its own.
        scale: what the kept elements were multiplied by; it may differ by row.
    """

    x: Tensor
    mask: Tensor | None = None
    scale: float | Tensor = 1.0


class Seeded(NamedTuple):
    """A dropout, of what the factors see, whose mask is computed again where it is needed.

    Args:
        seed: see `multigraft.kernels.regenerated`.
        p: the share of elements that are dropped.
    """

    seed: Tensor
    p: float


def adapted_linear_reference(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float
) -> Tensor:
    """The specification, in plain operators, for one layer and one adapter."""
    return F.linear(x, W, bias) + F.linear(F.linear(x, A.to(x.dtype)) * scale, B.to(x.dtype))


def adapted_linear(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    dropped: Dropped | None = None,
) -> Tensor:
    """``x Wᵀ + b + scale · (x Aᵀ) Bᵀ`` for a ``W`` and ``b`` that take no gradients."""
    return adapted_linears(x, [Part(W, bias, (A,), (B,), (scale,))], dropped)[0]


def adapted_linears(
    x: Tensor,
    parts: Sequence[Part],
    dropped: Dropped | Seeded | None = None,
    stack: Stack | None = None,
) -> list[Tensor]:
    """The outputs ``(..., out)`` of all these layers, in one node.

    Args:
        x: with several adapters, ``(rows, ..., in)`` with equally many rows for each.
        dropped: what the factors see in place of ``x``; `Seeded` for one adapter alone.
        stack: the layers' factors as they are now, where no gradient is wanted.
    """
    is_one = len(parts) == 1 and len(parts[0].A) == 1 and dropped is None
    if is_one and not torch.is_grad_enabled():
        return [_single(x, parts[0])]
    layout = layout_for(parts)
    tensors: list[Tensor | None] = []
    for part in parts:
        tensors += (part.W, part.bias, *part.A, *part.B)
    is_traced = torch.compiler.is_compiling()
    if not torch.is_grad_enabled() or (is_traced and not IS_TRACED):
        seeded = dropped if isinstance(dropped, Seeded) else None
        seen = dropped.x if isinstance(dropped, Dropped) else x
        flat = _forward(
            layout, x, seen, stack or layout.stacked(tensors, x.dtype), tensors, seeded
        )[0]
    else:
        node = _Traced if is_traced else _AdaptedLinears
        how = (None, *dropped) if isinstance(dropped, Seeded) else dropped or (None, None, 1.0)
        found = node.apply(layout, x, *how, *tensors)
        flat = found[-layout.layers :]
    lead = x.shape[:-1]
    if flat[0].shape[:-1] == lead:
        return list(flat)
    # Viewed out here: what a node gives as a view, nobody may write to.
    return [y.view(*lead, y.shape[-1]) for y in flat]


def _single(x: Tensor, part: Part) -> Tensor:
    """One layer and one adapter without gradients: for few tokens every microsecond counts."""
    W, bias, (A,), (B,), (scale,) = part
    if A.dtype != x.dtype:
        A, B = A.to(x.dtype), B.to(x.dtype)
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y = begun(bias, torch.mm(flat, A.T), B.T, scale).addmm_(flat, W.T)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def _forward(
    layout: Layout,
    x: Tensor,
    seen: Tensor,
    stack: Stack,
    tensors: Sequence[Tensor | None],
    seeded: Seeded | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Each layer's output, ``(tokens, out)`` or ``(adapters, tokens of each, out)``, and s."""
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    s = _narrow(layout, seen, stack.A, seeded)
    ys = []
    for i, (start, rank) in enumerate(layout.columns):
        W, bias = tensors[i * layout.size : i * layout.size + 2]
        assert W is not None
        own = s if layout.layers == 1 else s.narrow(-1, start, rank)
        right, scale = stack.Bs[i].mT, layout.scale[i]
        y = begun(bias, own, right, scale)
        (y if y.dim() == 2 else y.view(-1, y.shape[-1])).addmm_(flat, W.T)
        ys.append(y)
    return ys, s


def _narrow(layout: Layout, seen: Tensor, A: Tensor, seeded: Seeded | None = None) -> Tensor:
    """The narrow products of all layers side by side."""
    if seeded is not None:
        return dropped_shrink(_shared(seen, layout), A, *seeded)
    s = thin(_shared(seen, layout), A.mT, 1.0)
    return s if layout.uneven is None else s * layout.factors(s)


class _AdaptedLinears(Node):
    """All layers with all their pairs.

    Inputs: the layout, x, what the factors see with its mask and scale, the layers' tensors. A
    mask alone is the seed of a dropout, and the scale its rate.

    Outputs: s, those stacked factors that are no inputs, and each layer's output ``(tokens, out)``.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        layout: Layout, x: Tensor, seen: Tensor | None, mask: Any, kept: float, *tensors: Any
    ) -> tuple[Tensor, ...]:
        A, Bs = stack = layout.stacked(tensors, x.dtype)
        seeded = Seeded(mask, kept) if seen is None and mask is not None else None
        ys, s = _forward(layout, x, x if seen is None else seen, stack, tensors, seeded)
        if layout.is_single and A is tensors[2]:
            return s, *ys
        own = {id(tensor) for tensor in tensors}
        return s, *(t for t in (A, *Bs) if id(t) not in own), *ys

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        layout, x, seen, mask, ctx.kept, *tensors = inputs
        ctx.layout, ctx.shape, ctx.is_apart = layout, x.shape, seen is not None
        inner = output[: -layout.layers]
        ctx.mark_non_differentiable(*inner)
        ctx.set_materialize_grads(False)
        ctx.stacked = len(inner) - 1
        # The biases are not needed; their places stay empty.
        held = list(tensors)
        held[1 :: layout.size] = [None] * layout.layers
        # Without a gradient of any A, x has done its work (LoRA-FA).
        ctx.dtype = x.dtype
        needs = ctx.needs_input_grad[5:]
        needs_A = any(any(needs[i + 2 : i + 2 + layout.adapters]) for i in layout.firsts)
        read = (seen if ctx.is_apart else x) if needs_A else None
        ctx.save_for_backward(read, mask, *inner, *held)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        layout: Layout = ctx.layout
        dys = grads[1 + ctx.stacked :]
        seen, mask, s, *more = ctx.saved_tensors
        ready, tensors = more[: ctx.stacked], more[ctx.stacked :]
        if torch.is_grad_enabled():
            if seen is None:
                raise RuntimeError(
                    "second gradients through a frozen A need the layer's input, which was not "
                    "kept; let A take gradients (requires_grad_(True))."
                )
            # To autograd, what was kept is no function of x and the factors: for second gradients.
            stack = layout.stacked(tensors, seen.dtype)
            if mask is not None and not ctx.is_apart:
                tokens = seen.numel() // seen.shape[-1]
                whole = keeps(mask, tokens, seen.shape[-1], ctx.kept).view(seen.shape)
                seen = dropped_input(seen, mask, ctx.kept)
                mask, ctx.is_apart, ctx.kept = whole, True, 1.0 / (1.0 - ctx.kept)
            s = _narrow(layout, seen, stack.A)
        else:
            stack = layout.again(ready, tensors, ctx.dtype)
        return _gradients(ctx, stack, (seen, mask, s), tensors, dys)


class _Traced(torch.autograd.Function):
    """The same for `torch.compile`, which keeps what it likes: outputs are the layers' alone."""

    @staticmethod
    def forward(
        ctx: Any, layout: Layout, x: Tensor, seen: Any, mask: Any, kept: float, *tensors: Any
    ) -> tuple[Tensor, ...]:
        read = x if seen is None else seen
        ys, s = _forward(layout, x, read, layout.stacked(tensors, x.dtype), tensors)
        ctx.layout, ctx.shape, ctx.is_apart, ctx.kept = layout, x.shape, seen is not None, kept
        held = list(tensors)
        held[1 :: layout.size] = [None] * layout.layers
        ctx.save_for_backward(read, mask, s, *held)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:
        seen, mask, s, *tensors = ctx.saved_tensors
        stack = ctx.layout.stacked(tensors, seen.dtype)
        return _gradients(ctx, stack, (seen, mask, s), tensors, dys)


def _gradients(
    ctx: Any,
    stack: Stack,
    kept: tuple[Tensor, Tensor | None, Tensor],
    tensors: Sequence[Tensor],
    dys: Sequence[Tensor | None],
) -> tuple[Any, ...]:
    """Gradients of a node's inputs.

    Args:
        kept: what the factors saw, its mask and s.
    """
    layout: Layout = ctx.layout
    seen, mask, s = kept
    needs_x, needs_seen, _, _, *needs = ctx.needs_input_grad[1:]
    ds = _narrow_gradient(layout, dys, stack.Bs, s)
    seeded = Seeded(mask, ctx.kept) if mask is not None and not ctx.is_apart else None
    own = None
    if seeded is not None and needs_x:
        own = dropped_input_gradient(ds, stack.A, *seeded)
    elif needs_x or needs_seen:
        own = product(ds, stack.A).view(-1, ctx.shape[-1])
    dx = dseen = None
    if not ctx.is_apart:
        dx = own
    elif mask is None:
        dseen = None if own is None else own.view(ctx.shape)
    elif own is not None:
        dx = _kept(own.view(ctx.shape), mask.view(ctx.shape), ctx.kept).view(own.shape)
    if needs_x:
        for W, dy in zip(tensors[:: layout.size], dys, strict=True):
            if dy is not None:
                flat = dy if dy.dim() == 2 else dy.reshape(-1, dy.shape[-1])
                dx = torch.mm(flat, W) if dx is None else dx.addmm_(flat, W)
        dx = None if dx is None else dx.view(ctx.shape)
    found = _factor_gradients(layout, dys, ds, s, seen, tensors, needs, seeded)
    return None, dx, dseen if needs_seen else None, None, None, *found


def _kept(gradient: Tensor, mask: Tensor, scale: float | Tensor) -> Tensor:
    """The gradient of what a dropout's input was, for that of its output."""
    if isinstance(scale, Tensor):
        return (gradient * mask * scale).to(gradient.dtype)
    return torch.ops.aten.native_dropout_backward(gradient, mask, scale)


def _narrow_gradient(
    layout: Layout, dys: Sequence[Tensor | None], Bs: Sequence[Tensor], s: Tensor
) -> Tensor:
    """The gradient of s, of all layers side by side."""
    if layout.is_single and dys[0] is not None:
        return thin(dys[0], Bs[0], layout.scale[0])
    parts = []
    for rank, dy, B, scale in zip(layout.rank, dys, Bs, layout.scale, strict=True):
        if dy is None:
            parts.append(s.new_zeros(*s.shape[:-1], rank))
        else:
            parts.append(thin(_shared(dy, layout), B, scale))
    # Joined as they lie, the narrow side first.
    ds = parts[0] if layout.layers == 1 else torch.cat([part.mT for part in parts], dim=-2).mT
    return ds if layout.uneven is None else ds * layout.factors(ds)


def _factor_gradients(
    layout: Layout,
    dys: Sequence[Tensor | None],
    ds: Tensor,
    s: Tensor,
    seen: Tensor,
    tensors: Sequence[Tensor],
    needs: Sequence[bool],
    seeded: Seeded | None,
) -> list[Tensor | None]:
    """Gradients in the order of ``tensors``: slices of one product for all A, of one for each B."""
    if layout.is_single and dys[0] is not None:
        dA = _as(_over_tokens(layout, ds, seen, seeded), tensors[2]) if needs[2] else None
        dB = _as(thin(dys[0].mT, s, layout.scale[0]), tensors[3]) if needs[3] else None
        return [None, None, dA, dB]
    found: list[Tensor | None] = [None] * len(tensors)
    n, size = layout.adapters, layout.size
    firsts = [i * size + 2 for i in range(layout.layers) if dys[i] is not None]
    if any(any(needs[first : first + n]) for first in firsts):
        own = layout.split_A(_as(_over_tokens(layout, ds, seen, seeded), tensors[2]))
        for first in firsts:
            found[first : first + n] = own[first // size]
    for first in firsts:
        if any(needs[first + n : first + 2 * n]):
            i = first // size
            narrow = s if layout.layers == 1 else s.narrow(-1, *layout.columns[i])
            dB = _as(thin(_shared(dys[i], layout).mT, narrow, layout.scale[i]), tensors[first + n])
            found[first + n : first + 2 * n] = layout.split_B(dB, i)
    return found


def _over_tokens(layout: Layout, ds: Tensor, seen: Tensor, seeded: Seeded | None) -> Tensor:
    """The gradient of the stacked A."""
    if seeded is not None:
        return dropped_factor_gradient(ds, _shared(seen, layout), *seeded)
    return product(ds.mT, _shared(seen, layout))


def _as(gradient: Tensor, factor: Tensor) -> Tensor:
    return gradient if gradient.dtype == factor.dtype else gradient.to(factor.dtype)


def _shared(x: Any, layout: Layout) -> Any:
    """``(tokens, width)``, or with several adapters ``(adapters, tokens of each, width)``."""
    if layout.adapters == 1:
        return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return x.reshape(layout.adapters, -1, x.shape[-1])
