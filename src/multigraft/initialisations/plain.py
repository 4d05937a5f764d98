"""LoRA's own beginnings: B = 0, so that nothing changes, or both factors at random.

    True        A ~ Kaiming uniform, B = 0
    "gaussian"  A ~ N(0, 1 / rank²), B = 0
    False       both ~ Kaiming uniform

On an embedding B is normal and A zero: each column of A is one token's code.
"""

from __future__ import annotations

from torch import Tensor, nn

from multigraft.initialisations.contract import (
    Initialisation,
    LowRank,
    Plain,
    initialisation,
    kaiming,
)


@initialisation("true")
class Kaiming(Plain):
    """A as `nn.Linear` begins, B at zero."""


@initialisation("gaussian")
class Gaussian(Plain):
    """A normal, B at zero."""

    def fill_a(self, lora: LowRank, A: Tensor) -> None:
        nn.init.normal_(A, std=1 / lora.rank)


@initialisation("false")
class Random(Initialisation):
    """Neither factor at zero: the adapter changes the output from the start."""

    def fill(self, lora: LowRank, A: Tensor, B: Tensor) -> None:
        if lora.geometry.name == "embedding":
            nn.init.normal_(A)
            nn.init.normal_(B)
        else:
            kaiming(A)
            kaiming(B)
