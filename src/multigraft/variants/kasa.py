"""Knowledge-aware singular-value adaptation (KaSA): the weight's noise out, singular values in.

    ΔW = s B diag(λ) A - D        D = Σ σᵢ uᵢ vᵢᵀ over the rank smallest singular values of W

λ: (rank,), ``lora_diag``. With β‖λ‖² + γ(‖BᵀB - I‖ + ‖A Aᵀ - I‖) in the loss, summed over sites.

D follows from the base's weight, so it is no part of a file. The whole is a pair of rank 2·rank:

    ΔW = [s B, -U_D Σ_D] [diag(λ) A; V_Dᵀ]

Paper: Wang et al. 2024, arXiv:2412.06071, eqs. 5 to 12.
Departs: the papers' code writes W - D into the base; here D is subtracted beside it, so that the
base keeps its bits and other adapters stand on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from multigraft.config import require
from multigraft.draws import dropout
from multigraft.methods.contract import Method, Params, TensorSpec
from multigraft.variants._plain import add_bias, add_pair, factors
from multigraft.variants.contract import Variant, variant

VALUES = "lora_diag"
PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
DROPPED_A, DROPPED_B = "lora_dropped_A.weight", "lora_dropped_B.weight"


@dataclass
class KasaConfig:
    """KaSA's options, under PEFT's names.

    Args:
        beta: weight of the squared singular values in the loss.
        gamma: weight of the drive of A and B towards orthogonality in the loss.
    """

    beta: float = 1e-4
    gamma: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("beta", "gamma"):
            value = getattr(self, name)
            is_weight = isinstance(value, (int, float)) and value >= 0 and math.isfinite(value)
            require(is_weight, "KasaConfig", name, value, "a number of at least 0")


@variant("kasa")
class KaSA(Variant):
    """A pair with singular values between its factors, and the weight's noise taken out."""

    option = "kasa_config"
    options = KasaConfig
    identity_at_init = False
    derived = frozenset({DROPPED_A, DROPPED_B})

    @classmethod
    def selected(cls, config: Any) -> bool:
        return config.kasa_config is not None

    def refusal(self, lora: Method) -> str | None:
        layer = lora.site.layer
        if lora.geometry.name == "experts":
            return "`kasa_config` is not for stacked experts; adapt them with a plain LoRA"
        if getattr(layer, "groups", 1) > 1:
            return "`kasa_config` needs a convolution with `groups` 1"
        in_, out = lora.geometry.sizes(layer)
        smaller = min(in_ * math.prod(getattr(layer, "kernel_size", ())), out)
        if lora.rank >= smaller:
            return (
                f"the rank (={lora.rank}) must be below {smaller}, the weight's smaller size, so "
                "that `kasa_config` leaves some of it; lower `r`, or set it in `rank_pattern`"
            )
        return None

    def tensors(self, lora: Method) -> dict[str, TensorSpec]:
        a, b = lora.geometry.factor_shapes(lora.site.layer, lora.rank)
        return {
            VALUES: TensorSpec((lora.rank,)),
            DROPPED_A: TensorSpec(a, trainable=False, buffer=True, saved=False),
            DROPPED_B: TensorSpec(b, trainable=False, buffer=True, saved=False),
        }

    def reset(self, lora: Method, params: Params) -> None:
        nn.init.normal_(params[VALUES])
        self.derive(lora, params)

    def derive(self, lora: Method, params: Params) -> None:
        layer, geometry = lora.site.layer, lora.geometry
        W = lora.site.weight().detach()
        M = geometry.as_matrix(layer, W.to(torch.promote_types(W.dtype, torch.float32)))
        U, S, V = torch.linalg.svd(M, full_matrices=False)
        r = lora.rank
        a, b = geometry.from_pairs(layer, V[None, -r:], (U[:, -r:] * S[-r:])[None])
        params[DROPPED_A].copy_(a)
        params[DROPPED_B].copy_(b)

    def low_rank(self, lora: Method, params: Params) -> tuple[Tensor, Tensor, float]:
        A, B = self._update(lora, params)
        A = torch.cat([A, params[DROPPED_A]])
        return A, torch.cat([B * lora.scaling, -params[DROPPED_B]], dim=1), 1.0

    def trains_as_pair(self, lora: Method) -> bool:
        return not lora.dropout  # D acts on what is not dropped

    def add(
        self,
        lora: Method,
        params: Params,
        y: Tensor,
        x: Tensor,
        training: bool,
        base: Tensor | None,
    ) -> Tensor:
        if lora.dropout and training:
            y = add_pair(lora, y, x, params[DROPPED_A], -params[DROPPED_B], 1.0)
            A, B = self._update(lora, params)
            y = add_pair(lora, y, dropout(x, lora.dropout), A, B, lora.scaling)
        else:
            y = add_pair(lora, y, x, *self.low_rank(lora, params))
        return add_bias(lora, params, y)

    def delta(self, lora: Method, params: Params, W: Tensor | None) -> Tensor:
        A, B, _ = self.low_rank(lora, params)
        return lora.geometry.product(lora.site.layer, A, B)

    def penalty(self, config: Any, sites: Iterable[Params]) -> Tensor | None:
        options = config.kasa_config
        terms = []
        for params in sites:
            terms.append(options.beta * params[VALUES].float().square().sum())
            A, B = next((params[a], params[b]) for a, b in PAIRS if a in params)
            for P in (A.flatten(1).float(), B.flatten(1).T.float()):
                off = P @ P.T - torch.eye(len(P), device=P.device)
                terms.append(options.gamma * torch.linalg.norm(off))
        return torch.stack(terms).sum() if terms else None

    def _update(self, lora: Method, params: Params) -> tuple[Tensor, Tensor]:
        """The trained pair, singular values included."""
        A, B = factors(lora, params)
        return A * params[VALUES].view(-1, *(1,) * (A.dim() - 1)), B
