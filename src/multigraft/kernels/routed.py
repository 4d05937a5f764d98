"""Rows of many adapters in a fixed number of operators, however many adapters there are.

    y_i + scale_a · (x_i A_aᵀ) B_a        a: the adapter of row i, if it has one

x: (rows, ..., in)   y: (rows, ..., out)   A: (adapters, rank, in)   B: (adapters, rank, out)
Ranks that differ are padded with zeros. `grouped` reads each adapter's weights once and does no
work twice; `masked` has fewer and larger products, which is faster for few tokens on a GPU. Where
equally many rows of each lie in their adapters' order, `adapted_linears` does the base's too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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


def masked(y: Tensor, x: Tensor, A: Tensor, B: Tensor, mask: Tensor) -> Tensor:
    """All adapters' factors side by side as one pair; each row's foreign columns are set to zero.

    Args:
        mask: (rows, adapters · rank): the scale in the columns of the row's own adapter, else zero.
    """
    h = torch.matmul(x, A.flatten(0, 1).T)
    h = h * mask.view(mask.shape[0], *(1,) * (h.dim() - 2), mask.shape[1])
    flat = h.reshape(-1, h.shape[-1]).to(y.dtype)
    return torch.addmm(y.reshape(-1, y.shape[-1]), flat, B.flatten(0, 1)).view(y.shape)
