"""MiCA: B begins at the weight's minor directions, and stays there; A begins at zero.

    W = U diag(S) Vᵀ        A = 0,   B = U[:, -rank:]

The variant of the same name keeps B frozen (`multigraft.variants.mica`).

Paper: Rüdiger and Raschka 2026, arXiv:2604.01694.
"""

from __future__ import annotations

import torch
from torch import Tensor

from multigraft.initialisations._weights import weight
from multigraft.initialisations.contract import MATRICES, Initialisation, LowRank, initialisation


@initialisation("mica")
class MiCA(Initialisation):
    """B's columns are the left singular vectors of the smallest singular values."""

    geometries = MATRICES | {"embedding"}

    def refusal(self, lora: LowRank) -> str | None:
        smaller = min(lora.geometry.sizes(lora.site.layer))
        if lora.rank > smaller:
            return (
                f"the rank (={lora.rank}) must be at most {smaller}, the layer's smaller size, for "
                '`init_lora_weights="mica"`; lower `r`, or set it in `rank_pattern`'
            )
        return super().refusal(lora)

    def fill(self, lora: LowRank, A: Tensor, B: Tensor) -> None:
        U, _, _ = torch.linalg.svd(weight(lora), full_matrices=False)
        B.copy_(U[:, -lora.rank :])
        A.zero_()
