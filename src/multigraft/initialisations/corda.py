"""CorDA: A and B begin at components of the weight as the layer's inputs weigh them.

    W C = U S Vᵀ,  C the covariance of the inputs    A₀ = √(S_r / s) V_rᵀ C⁻¹,   B₀ = U_r √(S_r / s)

``"ipm"`` takes the ``rank`` largest components, to learn a task like the data; ``"kpm"`` the
smallest, to keep what the data knows. It takes data: `multigraft.calibration.corda`.

Paper: Yang et al. 2024, arXiv:2406.05223, eqs. 2 to 5.
Departs: the base keeps its bits; see `multigraft.initialisations.contract`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from multigraft.config import check_choice
from multigraft.errors import DataError, StateError
from multigraft.initialisations.contract import MATRICES, Initialisation, LowRank, initialisation

DAMPING = 0.01
INVERSE_ERROR = 0.05
ATTEMPTS = 40


@dataclass
class CordaConfig:
    """CorDA's options, under PEFT's names.

    Args:
        cache_file: where the components are kept, to begin from again.
        covariance_file: where the covariances are kept, for other ranks or the other method.
        corda_method: ``"ipm"`` or ``"kpm"``.
        verbose: show progress, where tqdm is installed.
        use_float16_for_covariance: sum covariances in the inputs' own dtype, not in float32.
        prune_temporary_fields: kept for PEFT's signature; nothing temporary is left here.

    Raises:
        ConfigError: `corda_method` is neither.
    """

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: str = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    def __post_init__(self) -> None:
        check_choice("CordaConfig", "corda_method", self.corda_method, ("ipm", "kpm"))


class Components(NamedTuple):
    """Of a weight as its inputs weigh it: S ``(rank,)``, U ``(out, rank)``, V ``(in, rank)``."""

    S: Tensor
    U: Tensor
    V: Tensor


FOUND: WeakKeyDictionary[nn.Module, Components] = WeakKeyDictionary()
"""What data has shown, by the layer; it goes with the layer, which does not know of it."""


def components(W: Tensor, C: Tensor, rank: int, method: str) -> Components:
    """The largest or smallest components of a weight as its inputs weigh it.

    Args:
        W: the weight, ``(out, in)``.
        C: the covariance of the inputs, ``(in, in)``.

    Raises:
        DataError: the covariance is not finite, or zero.
    """
    W, C = W.float(), C.float()
    level = C.diagonal().mean()
    if not (torch.isfinite(C).all() and level > 0):
        raise DataError("the covariance of its inputs is zero, or holds NaN or infinity.")
    eye = torch.eye(len(C), device=C.device)
    damping = DAMPING
    for _ in range(ATTEMPTS):
        damped = C + damping * level * eye
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, eye) < INVERSE_ERROR:
            break
        damping *= 2
    U, S, Vh = torch.linalg.svd(W @ damped, full_matrices=False)
    V = (Vh @ inverse).T
    part = slice(None, rank) if method == "ipm" else slice(-rank, None)
    return Components(S[part].clone(), U[:, part].clone(), V[:, part].clone())


@initialisation("corda")
class CorDA(Initialisation):
    """Components found by `multigraft.preprocess_corda`."""

    takes_out = True
    geometries = MATRICES
    plain_on = frozenset({"embedding"})
    option = "corda_config"
    options = CordaConfig

    def fill(self, lora: LowRank, A: Tensor, B: Tensor) -> None:
        found = FOUND.get(lora.site.layer)
        if found is None or len(found.S) != lora.rank:
            known = "nothing" if found is None else f"components of rank {len(found.S)}"
            raise StateError(
                f'{lora.site}: `init_lora_weights="corda"` with rank {lora.rank} needs data, and '
                f"{known} is known of this layer. Call preprocess_corda(model, config, run_model) "
                "with this model and config first."
            )
        root = (found.S.to(A.device) / lora.scaling).sqrt()
        A.copy_(root[:, None] * found.V.to(A.device).T)
        B.copy_(found.U.to(A.device) * root)
