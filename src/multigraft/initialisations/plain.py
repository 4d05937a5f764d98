"""LoRA's own beginnings: B = 0, so that nothing changes, or both factors at random.

    True        A ~ Kaiming uniform, B = 0
    "gaussian"  A ~ N(0, 1 / rank²), B = 0
    False       both ~ Kaiming uniform

On an embedding B is normal and A zero: each column of A is one token's code.
"""

from __future__ import annotations

from torch import Tensor, nn

from multigraft.initialisations._kaiming import kaiming
from multigraft.initialisations.contract import Initialisation, LowRank, initialisation


@initialisation("true")
class Kaiming(Initialisation):
    """A as `nn.Linear` begins, B at zero."""

    def fill(self, lora: LowRank, A: Tensor, B: Tensor) -> None:
        if lora.geometry.name == "embedding":
            nn.init.zeros_(A)
            nn.init.normal_(B)
        else:
            self.fill_a(lora, A)
            nn.init.zeros_(B)

    def fill_a(self, lora: LowRank, A: Tensor) -> None:
        """Write A's values where B is zero."""
        kaiming(A)


@initialisation("gaussian")
class Gaussian(Kaiming):
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
