"""Matrices with a low-rank change and a length for each of their rows, for who reads them whole.

    W' = g ∘ M        M = W + scale · B A,   g = m / n,   n = ‖M‖ of each row
    dM = g ∘ dW'      dm = rowsum(dW' ∘ M) / n      dA = scale · Bᵀ dM      dB = scale · dM Aᵀ

W: (n, out, in)   A: (n, rank, in)   B: (n, out, rank)   m: (n, out)

The norm is a constant to all gradients. Nothing as large as W is kept for the backward pass, which
makes M again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from multigraft.kernels.node import Node


def reweighted_matrices_reference(
    W: Tensor, A: Tensor, B: Tensor, scale: float, m: Tensor
) -> Tensor:
    """The specification, in plain operators."""
    M = W + scale * B @ A
    return (m / M.detach().norm(dim=2))[..., None] * M


def reweighted_matrices(W: Tensor, A: Tensor, B: Tensor, scale: float, m: Tensor) -> Tensor:
    """``m ∘ (W + scale · B A) / ‖W + scale · B A‖`` for a ``W`` without gradients."""
    if torch.compiler.is_compiling():
        return reweighted_matrices_reference(W, A, B, scale, m)
    found: Tensor = _ReweightedMatrices.apply(W, A, B, scale, m)[0]
    return found


class _ReweightedMatrices(Node):
    generate_vmap_rule = True

    @staticmethod
    def forward(W: Tensor, A: Tensor, B: Tensor, scale: float, m: Tensor) -> tuple[Tensor, Tensor]:
        M = torch.baddbmm(W, B, A, alpha=scale)
        n = torch.linalg.vector_norm(M, dim=2)
        return M.mul_((m / n)[..., None]), n

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        W, A, B, ctx.scale, m = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(W, A, B, m, output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        W, A, B, m, n = ctx.saved_tensors
        dW, (_, needs_A, needs_B, _, needs_m) = grads[0], ctx.needs_input_grad
        dA = dB = dm = None
        if needs_m:
            M = torch.baddbmm(W, B, A, alpha=ctx.scale)
            dm = (dW * M).sum(2) / n
        if needs_A or needs_B:
            dM = dW * (m / n)[..., None]
            dA = torch.bmm(B.mT, dM) * ctx.scale if needs_A else None
            dB = torch.bmm(dM, A.mT) * ctx.scale if needs_B else None
        return None, dA, dB, None, dm
