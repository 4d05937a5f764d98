"""LoRA's ``bias="all"`` and ``bias="lora_only"``: the adapter trains its own copy of a bias.

    b' = b + (trained - b)        trained: the bias's own shape

PEFT trains the base's bias in place, so one adapter at most can have it and disabling the adapter
does not give the base back. Here each adapter holds its copy; the file is the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from multigraft.methods.contract import Method, Params, TensorSpec, method


@method("BIAS", config=None, paper="arXiv:2106.10199 (BitFit)")
class Bias(Method):
    """A trained copy of one bias; its site names the parameter."""

    prefix = "bias_copy"
    needs_weight = True

    def tensors(self) -> dict[str, TensorSpec]:
        name = self.site.tensor_name
        base = getattr(self.site.layer, name)
        return {f"bias_copy_{name}": TensorSpec(tuple(base.shape), on_disk=name)}

    def reset(self, params: Params) -> None:
        (copy,) = params.values()
        with torch.no_grad():
            copy.copy_(self.site.weight())

    def delta(self, params: Params, W: Tensor | None = None) -> Tensor:
        assert W is not None
        (copy,) = params.values()
        return copy - W.to(copy.dtype)
