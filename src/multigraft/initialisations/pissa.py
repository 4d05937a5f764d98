"""PiSSA: A and B begin at the weight's principal components.

    W = U S Vᵀ        A₀ = √(S_r / s) V_rᵀ,   B₀ = U_r √(S_r / s),   so that s B₀ A₀ = U_r S_r V_rᵀ

``"pissa"`` takes the exact decomposition; ``"pissa_niter_k"`` a random one with ``k`` subspace
iterations, much faster on large layers.

Paper: Meng et al. 2024, arXiv:2404.02948, eqs. 2 to 4.
Departs: the base keeps its bits; see `multigraft.initialisations.contract`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection

import torch
from torch import Tensor

from multigraft.errors import MultigraftWarning
from multigraft.initialisations._weights import weight
from multigraft.initialisations.contract import MATRICES, Initialisation, LowRank, initialisation
from multigraft.methods.contract import Params


@initialisation("pissa")
class PiSSA(Initialisation):
    """Principal singular values and vectors.

    Args:
        iterations: of the random decomposition; None for the exact one.
    """

    takes_out = True
    geometries = MATRICES
    plain_on = frozenset({"embedding"})

    def __init__(self, iterations: int | None = None) -> None:
        self.iterations = iterations

    @classmethod
    def reads(cls, value: str) -> PiSSA | None:
        found = re.fullmatch(r"pissa(?:_niter_(\d+))?", value)
        if found is None:
            return None
        return cls(None if found[1] is None else int(found[1]))

    def fill(self, lora: LowRank, A: Tensor, B: Tensor) -> None:
        W = weight(lora)
        if self.iterations is None:
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
            U, S, Vh = U[:, : lora.rank], S[: lora.rank], Vh[: lora.rank]
        else:
            U, S, V = torch.svd_lowrank(W, lora.rank, niter=self.iterations)
            Vh = V.T
        root = (S / lora.scaling).sqrt()
        A.copy_(root[:, None] * Vh)
        B.copy_(U * root)

    def recover(self, lora: LowRank, params: Params, missing: Collection[str]) -> None:
        if self.iterations is not None:
            warnings.warn(
                f"{lora.site}: the file does not hold what a random decomposition took out of the "
                "base, so another one is made, as in PEFT, and outputs differ from those of "
                "training. Save it with path_initial_model_for_weight_conversion= where it was "
                "trained.",
                MultigraftWarning,
                stacklevel=2,
            )
        super().recover(lora, params, missing)
