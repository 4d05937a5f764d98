"""LoftQ: A and B begin at what quantising the weight loses.

    Q₁ = quantise(W),   L_t R_t = the ``rank`` largest components of W - Q_t,
    Q_{t+1} = quantise(W - L_t R_t)              s B₀ A₀ = L_T R_T,   the layer runs with Q_T

The base keeps its bits; the adapter holds Q in codes, and the variant of the same name
(`multigraft.variants.loftq`) runs the layer with it, so that training sees the weight that a
quantised base will have. A file holds L_{T-1} and R_{T-1}, from which Q follows.

Paper: Li et al. 2023, arXiv:2310.08659, algorithm 1.
Departs: s B₀ A₀ is L R whatever the scaling s is; PEFT's is for s = 1 alone.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from multigraft.config import require
from multigraft.initialisations._quantise import dequantise, quantise, shapes
from multigraft.initialisations._weights import weight
from multigraft.initialisations.contract import (
    MATRICES,
    START_A,
    START_B,
    Initialisation,
    LowRank,
    initialisation,
)
from multigraft.methods.contract import Params, TensorSpec

CODES, SCALES = "lora_quantised.codes", "lora_quantised.scales"
BITS = (2, 4, 8)


@dataclass
class LoftQConfig:
    """LoftQ's options, under PEFT's names.

    Args:
        loftq_bits: of the quantised weight: 4 (nf4), 8 (int8), or 2.
        loftq_iter: how often weight and factors are fitted to one another.

    Raises:
        ConfigError: a value is none of these.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1

    def __post_init__(self) -> None:
        bits, count = self.loftq_bits, self.loftq_iter
        require(bits in BITS, "LoftQConfig", "loftq_bits", bits, "2, 4 or 8")
        is_count = isinstance(count, int) and not isinstance(count, bool) and count >= 1
        require(is_count, "LoftQConfig", "loftq_iter", count, "an integer of at least 1")


def largest(M: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """L ``(out, rank)`` and R ``(rank, in)``, whose product is nearest to ``M``."""
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    root = S[:rank].sqrt()
    return U[:, :rank] * root, root[:, None] * Vh[:rank]


@initialisation("loftq")
class LoftQ(Initialisation):
    """The largest components of the quantisation error."""

    from_weight = True
    geometries = MATRICES
    option = "loftq_config"
    options = LoftQConfig

    def refusal(self, lora: LowRank) -> str | None:
        if not lora.site.storage.is_exact:
            return (
                'its weight is quantised already, and `init_lora_weights="loftq"` begins at what '
                "quantising loses; use init_lora_weights=True, and for a new adapter call "
                "replace_lora_weights_loftq(), which reads the weights before quantisation"
            )
        return super().refusal(lora)

    def tensors(self, lora: LowRank) -> dict[str, TensorSpec]:
        in_, out = lora.geometry.sizes(lora.site.layer)
        codes, scales = shapes(out, in_, _bits(lora))
        derived = TensorSpec(codes, trainable=False, buffer=True, saved=False, dtype=torch.uint8)
        specs = {CODES: derived, SCALES: derived._replace(shape=scales, dtype=torch.float32)}
        if lora.config.loftq_config.loftq_iter == 1:
            return specs
        start = TensorSpec((lora.rank, in_), trainable=False, buffer=True, optional=True)
        return {START_A: start, START_B: start._replace(shape=(out, lora.rank)), **specs}

    def reset(self, lora: LowRank, params: Params) -> None:
        W = weight(lora).float()
        L, R = largest(W - self._store(lora, params, W), lora.rank)
        for _ in range(lora.config.loftq_config.loftq_iter - 1):
            params[START_A].copy_(R)
            params[START_B].copy_(L)
            # As a file's reader will see them, in the adapter's dtype.
            own = params[START_B].float() @ params[START_A].float()
            L, R = largest(W - self._store(lora, params, W - own), lora.rank)
        root = lora.scaling**0.5
        params[lora.A].copy_(R / root)
        params[lora.B].copy_(L / root)

    def recover(self, lora: LowRank, params: Params, missing: Collection[str]) -> None:
        if START_A in missing or START_B in missing:
            self.reset(lora, params)
            return
        W = weight(lora).float()
        if START_A in params:
            W = W - params[START_B].float() @ params[START_A].float()
        self._store(lora, params, W)

    def quantised(self, lora: LowRank, params: Params) -> Tensor:
        """The weight that the layer runs with, in the weight's layout, in float32."""
        in_, out = lora.geometry.sizes(lora.site.layer)
        Q = dequantise(params[CODES], params[SCALES], out, in_, _bits(lora))
        return cast(Tensor, lora.geometry.from_matrix(lora.site.layer, Q))

    def _store(self, lora: LowRank, params: Params, W: Tensor) -> Tensor:
        codes, scales = quantise(W, _bits(lora))
        params[CODES].copy_(codes)
        params[SCALES].copy_(scales)
        out, in_ = W.shape
        return dequantise(codes, scales, out, in_, _bits(lora))


def _bits(lora: LowRank) -> int:
    bits: int = lora.config.loftq_config.loftq_bits
    return bits
