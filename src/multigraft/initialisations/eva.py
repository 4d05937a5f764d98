"""EVA: A begins at the directions in which the layer's inputs vary most; B is zero.

    X = U S Vᵀ  of the inputs, less their mean          A₀ = V_rᵀ,   B₀ = 0

and each layer gets as many directions as, over all layers, explain most. That takes data:
`multigraft.calibration.eva`. Until then A begins at random.

Paper: Paischer et al. 2024, arXiv:2410.07170, algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from multigraft.config import require
from multigraft.initialisations.contract import Plain, initialisation


@dataclass
class EvaConfig:
    """EVA's options, under PEFT's names.

    Args:
        rho: a layer gets at most ``rho * r`` ranks; 1 leaves each at ``r``.
        tau: a direction has converged when the cosine between two steps is at least this.
        use_label_mask: leave out tokens whose label is `label_mask_value`.
        label_mask_value: the label of tokens that do not count.
        whiten: divide each direction by the root of its singular value.
        adjust_scaling_factors: keep ``alpha / r`` of a layer as its rank changes.

    Raises:
        ConfigError: `rho` is below 1, or `tau` no cosine from 0 to 1.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        require(self.rho >= 1.0, "EvaConfig", "rho", self.rho, "at least 1")
        require(0.0 <= self.tau <= 1.0, "EvaConfig", "tau", self.tau, "between 0 and 1")


@initialisation("eva")
class EVA(Plain):
    """As plain LoRA begins, until data is shown."""

    option = "eva_config"
    options = EvaConfig
