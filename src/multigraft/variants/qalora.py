"""Quantisation-aware LoRA (QA-LoRA): A sees the mean of each group of inputs.

    y = W x + scaling * B A (in / g) pool(x)        A: (rank, in / g)   B: (out, rank)

`pool` is the mean over each group of ``g`` neighbouring inputs, so ΔW is constant within a group of
a row: what a quantised weight with groups of ``g`` can take up in its zero points. The factor
``in / g``, the number of groups, is PEFT's.

Paper: Xu et al. 2023, arXiv:2309.14717, section 3.3.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from multigraft.config import require
from multigraft.methods.contract import Method, Params, TensorSpec
from multigraft.variants.contract import Variant, variant

PLAIN_STARTS = (True, False, "gaussian")


@variant("qalora")
class QALora(Variant):
    """A plain pair whose A is the same for all inputs of a group."""

    is_pair = True

    @classmethod
    def selected(cls, config: Any) -> bool:
        return bool(config.use_qalora)

    @classmethod
    def check(cls, config: Any) -> None:
        g = config.qalora_group_size
        is_size = isinstance(g, int) and not isinstance(g, bool) and g > 0
        require(is_size, "LoraConfig", "qalora_group_size", g, "an integer of at least 1")

    def refusal(self, lora: Method) -> str | None:
        config = lora.config
        if not lora.geometry.is_matmul or lora.site.rebinds:
            return "`use_qalora` is for linear layers that run; use plain LoRA for this one"
        if config.lora_bias:
            return "`use_qalora` cannot be combined with `lora_bias`; leave one of them out"
        if config.init_lora_weights not in PLAIN_STARTS:
            return (
                f"`use_qalora` has no A of the shape that {config.init_lora_weights!r} gives; set "
                "`init_lora_weights` to True"
            )
        in_, _ = lora.geometry.sizes(lora.site.layer)
        if in_ % config.qalora_group_size:
            sizes = ", ".join(str(n) for n in _divisors(in_, config.qalora_group_size))
            return (
                f"`qalora_group_size` (={config.qalora_group_size}) must divide the layer's `in` "
                f"(={in_}); try {sizes}"
            )
        return None

    def tensors(self, lora: Method) -> dict[str, TensorSpec]:
        in_, _ = lora.geometry.sizes(lora.site.layer)
        shape = (lora.rank, in_ // lora.config.qalora_group_size)
        return {lora.geometry.factors[0]: TensorSpec(shape)}

    def pair(self, lora: Method, params: Params) -> tuple[Tensor, Tensor]:
        A, B = super().pair(lora, params)
        g = lora.config.qalora_group_size
        groups = A.shape[1]
        # A (in / g) mean(x over g) = (A in / g²) repeated g times, times x.
        return (A * (groups / g)).repeat_interleave(g, dim=1), B


def _divisors(n: int, near: int) -> list[int]:
    """The divisors of ``n`` on either side of ``near``."""
    all_ = [d for d in range(1, n + 1) if n % d == 0]
    below = [d for d in all_ if d < near]
    return [*below[-1:], *[d for d in all_ if d > near][:1]]
