"""LoRA-GA: A and B begin where their first gradient step is nearest to that of the whole weight.

    ∂L/∂W = U S Vᵀ        A₀ = V[:, I]ᵀ,   B₀ = U[:, J] S[J]

``direction`` says which of the ``2 rank`` leading directions I and J are, ``scale`` how large the
factors are. It takes gradients: `multigraft.calibration.loraga`.

Paper: Wang et al. 2024, arXiv:2407.05000, theorems 3.1 and 3.2.
Departs: B₀ keeps the singular values, as in PEFT; and the base keeps its bits, see
`multigraft.initialisations.contract`.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from multigraft.config import check_choice, require
from multigraft.errors import MultigraftWarning, StateError
from multigraft.initialisations._weights import weight
from multigraft.initialisations.contract import (
    MATRICES,
    START_A,
    START_B,
    Initialisation,
    LowRank,
    initialisation,
)
from multigraft.methods.contract import Params

DIRECTIONS = ("ArBr", "A2rBr", "ArB2r", "random")
SCALES = ("stable", "weight_svd", "gd_scale", "unit")
ITERATIONS = 4


@dataclass
class LoraGAConfig:
    """LoRA-GA's options, under PEFT's names.

    Args:
        direction: which of the gradient's directions A and B take: ``"ArB2r"`` the first and the
            second half, ``"A2rBr"`` the other way round, ``"ArBr"`` the odd and the even ones,
            ``"random"`` the same random half.
        scale: how large they are: ``"stable"`` by the layer's outputs and `stable_gamma`,
            ``"weight_svd"`` as the weight, ``"gd_scale"`` less the adapter's scaling, ``"unit"``
            as they are.
        stable_gamma: of ``"stable"``.

    Raises:
        ConfigError: a value is none of these.
    """

    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: int = 16

    def __post_init__(self) -> None:
        check_choice("LoraGAConfig", "direction", self.direction, DIRECTIONS)
        check_choice("LoraGAConfig", "scale", self.scale, SCALES)
        gamma = self.stable_gamma
        require(gamma > 0, "LoraGAConfig", "stable_gamma", gamma, "above 0")


class Gradient(NamedTuple):
    """Leading directions of a weight's gradient: U ``(out, n)``, S ``(n,)``, V ``(in, n)``."""

    U: Tensor
    S: Tensor
    V: Tensor


FOUND: WeakKeyDictionary[nn.Module, Gradient] = WeakKeyDictionary()
"""What gradients have shown, by the layer; it goes with the layer, which does not know of it."""


def leading(gradient: Tensor, rank: int) -> Gradient:
    """The directions of a gradient ``(out, in)`` from which an adapter of this rank can begin."""
    many = min(4 * rank, *gradient.shape)
    U, S, V = torch.svd_lowrank(gradient.float(), q=many, niter=ITERATIONS)
    return Gradient(U[:, : 2 * rank].clone(), S[: 2 * rank].clone(), V[:, : 2 * rank].clone())


@initialisation("lora_ga")
class LoRAGA(Initialisation):
    """Directions of the gradients seen by `multigraft.preprocess_loraga`."""

    takes_out = True
    geometries = MATRICES
    plain_on = frozenset({"embedding", "conv"})
    option = "lora_ga_config"
    options = LoraGAConfig

    def refusal(self, lora: LowRank) -> str | None:
        smaller = min(lora.geometry.sizes(lora.site.layer))
        if 2 * lora.rank > smaller:
            return (
                f"the rank (={lora.rank}) must be at most {smaller // 2}, half the layer's smaller "
                'size, for `init_lora_weights="lora_ga"`; lower `r`, or set it in `rank_pattern`'
            )
        return super().refusal(lora)

    def fill(self, lora: LowRank, A: Tensor, B: Tensor) -> None:
        found, r = FOUND.get(lora.site.layer), lora.rank
        if found is None or len(found.S) < 2 * r:
            known = "none is" if found is None else f"those for rank {len(found.S) // 2} are"
            raise StateError(
                f'{lora.site}: `init_lora_weights="lora_ga"` with rank {r} needs gradients, and '
                f"{known} known of this layer. Call preprocess_loraga(model, config, train_step) "
                "with this model and config first."
            )
        U, S, V = (t.to(A.device) for t in found)
        first, second = _directions(lora.config.lora_ga_config.direction, r)
        a, b, s = V[:, first].T, U[:, second] * S[second], S[second]
        a, b = _scaled(lora, a, b, s)
        A.copy_(a)
        B.copy_(b)

    def recover(self, lora: LowRank, params: Params, missing: Collection[str]) -> None:
        if lora.site.layer in FOUND:
            super().recover(lora, params, missing)
            return
        warnings.warn(
            f"{lora.site}: the file does not hold what LoRA-GA took out of the base, and without "
            "the gradients it cannot be known: the adapter is added to the whole base, as PEFT "
            "does. Save it with path_initial_model_for_weight_conversion= where it was trained.",
            MultigraftWarning,
            stacklevel=2,
        )
        params[START_A].zero_()
        params[START_B].zero_()


def _directions(name: str, rank: int) -> tuple[Tensor, Tensor]:
    """Which of the ``2 rank`` directions A and B take."""
    every = torch.arange(2 * rank)
    if name == "ArBr":
        return every[1::2], every[0::2]
    if name == "A2rBr":
        return every[rank:], every[:rank]
    if name == "ArB2r":
        return every[:rank], every[rank:]
    drawn = torch.randperm(2 * rank)[:rank]
    return drawn, drawn


def _scaled(lora: LowRank, a: Tensor, b: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The factors at the size that the config asks for; ``s`` are B's singular values."""
    options = lora.config.lora_ga_config
    if options.scale == "stable":
        return a, b * (b.shape[0] ** 0.25 / options.stable_gamma**0.5)
    if options.scale == "weight_svd":
        _, own, _ = torch.svd_lowrank(weight(lora), q=lora.rank, niter=ITERATIONS)
        return a, b * (own[0] / s[0]) if s[0] > 0 else b
    if options.scale == "gd_scale":
        return a / lora.scaling, b / lora.scaling
    return a, b
