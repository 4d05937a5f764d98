"""Rows of many adapters in a fixed number of operators, however many adapters there are.

    y_i + scale_a · (x_i A_aᵀ) B_a        a: the adapter of row i, if it has one

x: (rows, ..., in)   y: (rows, ..., out)   A: (adapters, rank, in)   B: (adapters, rank, out)
Ranks that differ are padded with zeros. `grouped` reads each adapter's weights once and does no
work twice; `masked` has fewer and larger products, which is faster for few tokens on a GPU;
`grouped_linear` does the frozen base layer's product too, where rows lie in their adapters' order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multigraft.kernels.node import Node


def routed_reference(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: Tensor, owner: Tensor
) -> Tensor:
    """The specification, row by row.

    Args:
        scale: (adapters,).
        owner: (rows,), each row's adapter as an index, or -1 for none.
    """
    rows = []
    for row, adapter in enumerate(owner.tolist()):
        if adapter < 0:
            rows.append(y[row])
        else:
            h = F.linear(x[row], A[adapter].to(x.dtype))
            rows.append(y[row] + (h @ B[adapter].to(h.dtype)) * scale[adapter])
    return torch.stack(rows).to(y.dtype)


def grouped(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: Tensor, slots: Tensor, in_order: bool
) -> Tensor:
    """Rows sorted by adapter, then one batched product over the adapters each way.

    Args:
        scale: (adapters, places): zero where a place is filled up with another adapter's row.
        slots: (adapters, places), row indices.
        in_order: whether ``slots`` counts up from zero to the last row.
    """
    adapters, places = slots.shape
    flat = x.reshape(x.shape[0], -1, x.shape[-1])
    seen = flat if in_order else flat.index_select(0, slots.reshape(-1))
    tokens = flat.shape[1]
    h = torch.bmm(seen.reshape(adapters, places * tokens, -1), A.transpose(1, 2))
    h = (h.view(adapters, places, tokens, -1) * scale[:, :, None, None]).flatten(1, 2).to(y.dtype)
    if in_order:
        out = torch.baddbmm(y.reshape(adapters, places * tokens, -1), h, B)
        return out.view(y.shape)
    own = torch.bmm(h, B).view(adapters * places, *y.shape[1:])
    return y.index_add(0, slots.reshape(-1), own)


def masked(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, mask: Tensor, in_place: bool = False
) -> Tensor:
    """All adapters' factors side by side as one pair; each row's foreign columns are set to zero.

    Args:
        mask: (rows, adapters · rank): the scale in the columns of the row's own adapter, else zero.
        in_place: whether ``y`` may be written to.
    """
    h = torch.matmul(x, A.flatten(0, 1).T)
    h = h * mask.view(mask.shape[0], *(1,) * (h.dim() - 2), mask.shape[1])
    flat, wide = h.reshape(-1, h.shape[-1]).to(y.dtype), B.flatten(0, 1)
    add = torch.Tensor.addmm_ if in_place else torch.Tensor.addmm
    out: Tensor = add(y.reshape(-1, y.shape[-1]), flat, wide)
    return out.view(y.shape)


def grouped_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: Tensor
) -> Tensor:
    """The frozen base layer and `grouped`, as one node, for rows in their adapters' order.

    Args:
        x: (rows, ..., in) with equally many rows for each adapter, the first one's first.
        scale: (adapters,).
    """
    y: Tensor = _GroupedLinear.apply(x, W, bias, A, B, scale[:, None, None])[0]
    return y


class _GroupedLinear(Node):
    """As `adapted_linear`, with a batch of pairs: the narrow product first, the base's onto it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        s = torch.bmm(x.reshape(A.shape[0], -1, x.shape[-1]), A.transpose(1, 2)) * scale
        own = torch.bmm(s, B) if bias is None else torch.baddbmm(bias, s, B)
        y = own.view(-1, W.shape[0]).addmm_(x.reshape(-1, x.shape[-1]), W.T)
        return y.view(*x.shape[:-1], W.shape[0]), s

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, W, _, A, B, scale = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, W, A, B, scale, output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, W, A, B, scale, s = ctx.saved_tensors
        dy = grads[0].reshape(A.shape[0], -1, W.shape[0])
        ds = torch.bmm(dy, B.transpose(1, 2)) * scale
        dx = dA = dB = None
        if ctx.needs_input_grad[0]:
            own = torch.bmm(ds, A).view(-1, x.shape[-1])
            dx = own.addmm_(dy.view(-1, W.shape[0]), W).view(x.shape)
        if ctx.needs_input_grad[3]:
            dA = torch.bmm(ds.transpose(1, 2), x.reshape(A.shape[0], -1, x.shape[-1]))
        if ctx.needs_input_grad[4]:
            dB = torch.bmm(s.transpose(1, 2), dy)
        return dx, None, None, dA, dB, None
