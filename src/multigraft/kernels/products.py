"""The products that nodes of the graph are made of, in the orders that cost least.

The narrow product comes first and the base's accumulates onto it, so that sums are rounded once and
nothing as wide as the output is written to be added afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from multigraft.kernels.layout import constants

FEW_TOKENS = 16
"""Below, what a product costs is not its arithmetic."""


def thin(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """``scale · left right`` for a narrow ``right``.

    A CPU is several times faster on the same product transposed, unless there are few tokens.
    """
    if left.device.type == "cpu" and min(left.shape[-2:]) >= FEW_TOKENS:
        return scaled(right.mT, left.mT, scale).mT
    return scaled(left, right, scale)


def begun(bias: Tensor | None, s: Tensor, right: Tensor, scale: float) -> Tensor:
    """What the base's product is accumulated onto: the narrow one, and the bias if there is one.

    In this order, because the sum of the two is rounded once.
    """
    return scaled(s, right, scale) if bias is None else accumulate(bias, s, right, scale)


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left right``, of matrices or of batches of them."""
    return torch.mm(left, right) if left.dim() == 2 else torch.bmm(left, right)


def accumulate(start: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """``start + scale · left right``."""
    add = torch.addmm if left.dim() == 2 else torch.baddbmm
    return add(start, left, right, alpha=scale)


def scaled(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """``scale · left right`` in one product: what is added to it is nothing, and never read."""
    if scale == 1.0:
        return product(left, right)
    add = torch.addmm if left.dim() == 2 else torch.baddbmm
    nothing = constants((0.0,), left.dtype, left.device)
    return add(nothing, left, right, beta=0, alpha=scale)
