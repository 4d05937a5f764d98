"""OLoRA: A and B begin at the first rows and columns of the weight's QR decomposition.

    W = Q R        A₀ = R[:rank],   B₀ = Q[:, :rank]

Paper: Büyükakyüz 2024, arXiv:2406.01775, algorithm 1.
Departs: the base keeps its bits; see `multigraft.initialisations.contract`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from multigraft.initialisations._weights import weight
from multigraft.initialisations.contract import MATRICES, Initialisation, LowRank, initialisation


@initialisation("olora")
class OLoRA(Initialisation):
    """B's columns orthonormal."""

    takes_out = True
    geometries = MATRICES
    plain_on = frozenset({"embedding"})

    def fill(self, lora: LowRank, A: Tensor, B: Tensor) -> None:
        Q, R = torch.linalg.qr(weight(lora))
        A.copy_(R[: lora.rank])
        B.copy_(Q[:, : lora.rank])
