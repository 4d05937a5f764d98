"""A linear layer whose backward pass has only a summary of its input.

    h = x Aᵀ                        forwards exact
    dX = dH A                       exact
    dA = scale · dHᵀ x̂              x̂ = c ⊗ e: each group of features is rebuilt from one number

x: (..., in)   A: (rank, in)   e: (size,)   c: (tokens, groups), c[t, g] = x[t, group g] · e

``in`` is split into groups of ``size`` features, the last one filled up with zeros. Saved are c,
which is ``size`` times smaller than x, A and e. dA is computed of dHᵀ c, and x̂ is never made.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multigraft.kernels.node import Node


def group_size(in_: int, groups: int) -> int:
    """Features of one group."""
    return -(-in_ // groups)


def grouped_features(x: Tensor, groups: int) -> Tensor:
    """``x`` ``(..., in)`` as ``(tokens, groups, size)``."""
    size = group_size(x.shape[-1], groups)
    missing = groups * size - x.shape[-1]
    return (F.pad(x, (0, missing)) if missing else x).reshape(-1, groups, size)


def compressed_linear_reference(
    x: Tensor, A: Tensor, e: Tensor, groups: int, scale: float
) -> Tensor:
    """The specification, in plain operators: exact in value, and in x's gradient."""
    rebuilt = (grouped_features(x, groups) @ e)[..., None] * e * scale
    rebuilt = rebuilt.flatten(1)[:, : x.shape[-1]].view(x.shape).detach()
    own = F.linear(rebuilt, A)
    return F.linear(x, A.detach()) + own - own.detach()


def compressed_linear(x: Tensor, A: Tensor, e: Tensor, groups: int, scale: float) -> Tensor:
    """``x Aᵀ``, of which A gets its gradient from compressed activations.

    Args:
        groups: parts that the features are split into.
        scale: what the rebuilt activations are multiplied by.
    """
    h: Tensor = _CompressedLinear.apply(x, A, e.to(x.dtype), groups, scale)
    return h


class _CompressedLinear(Node):
    @staticmethod
    def forward(x: Tensor, A: Tensor, e: Tensor, groups: int, scale: float) -> Tensor:
        return F.linear(x, A)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, A, e, groups, ctx.scale = inputs
        ctx.save_for_backward(grouped_features(x, groups) @ e, A, e)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        # Under autocast h, and so its gradient, is narrower than what it was computed of.
        dh = grads[0]
        c, A, e = (tensor.to(dh.dtype) for tensor in ctx.saved_tensors)
        dx = dA = None
        if ctx.needs_input_grad[0]:
            dx = torch.matmul(dh, A)
        if ctx.needs_input_grad[1]:
            narrow = torch.mm(dh.reshape(-1, A.shape[0]).T, c) * ctx.scale
            dA = (narrow[..., None] * e).flatten(1)[:, : A.shape[1]]
        return dx, dA, None, None, None
