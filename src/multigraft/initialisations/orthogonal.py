"""Orthogonal beginning: the rows of A and the columns of B lie in complementary subspaces.

    Q: a random orthogonal matrix (rank, rank)        A = Q[odd]ᵀ G / 10,   B = H Q[even] / 10

G (rank / 2, in) and H (out, rank / 2) are normal. The subspaces are orthogonal, so B A = 0 and the
adapter changes nothing at first, with neither factor at zero.

Source: datta0.github.io/posts/rethink-lora-init, as PEFT has it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from multigraft.initialisations.contract import MATRICES, Initialisation, LowRank, initialisation


@initialisation("orthogonal")
class Orthogonal(Initialisation):
    """Both factors random, their product zero."""

    geometries = MATRICES
    plain_on = frozenset({"embedding"})

    def refusal(self, lora: LowRank) -> str | None:
        if lora.rank % 2:
            return (
                f'the rank (={lora.rank}) must be even for `init_lora_weights="orthogonal"`; try '
                f"{lora.rank + 1}"
            )
        return super().refusal(lora)

    def fill(self, lora: LowRank, A: Tensor, B: Tensor) -> None:
        rank, half = lora.rank, lora.rank // 2
        dtype = torch.promote_types(A.dtype, torch.float32)
        Q, _ = torch.linalg.qr(torch.randn(rank, rank, dtype=dtype))
        left = torch.randn(half, A.shape[1], dtype=dtype)
        right = torch.randn(B.shape[0], half, dtype=dtype)
        A.copy_(Q[0::2].T @ left / 10)
        B.copy_(right @ Q[1::2] / 10)
