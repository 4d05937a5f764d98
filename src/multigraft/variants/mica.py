"""Minor component adaptation (MiCA): B is frozen at the weight's minor directions, A is trained.

    ΔW = s B A        B = U[:, -rank:] of W = U diag(S) Vᵀ,   A = 0 at the start

Where B begins says `multigraft.initialisations.mica`; `init_lora_weights="mica"` means both.

Paper: Rüdiger and Raschka 2026, arXiv:2604.01694.
"""

from __future__ import annotations

from typing import Any

from multigraft.methods.contract import Method, TensorSpec
from multigraft.variants.contract import Variant, variant


@variant("mica")
class MiCA(Variant):
    """A plain pair of which one factor is trained."""

    is_pair = True

    @classmethod
    def selected(cls, config: Any) -> bool:
        value = config.init_lora_weights
        return isinstance(value, str) and value.lower() == "mica"

    def tensors(self, lora: Method) -> dict[str, TensorSpec]:
        _, shape = lora.geometry.factor_shapes(lora.site.layer, lora.rank)
        return {lora.geometry.factors[1]: TensorSpec(shape, trainable=False)}
