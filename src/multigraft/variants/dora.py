"""Weight-decomposed low-rank adaptation (DoRA).

    W' = m * (W + s B A) / ‖W + s B A‖        m: (out,)   norm over each output feature's weights

The norm is taken from the factors, never from the dense product:

    ‖W + s B A‖² = ‖W‖² + 2 s rowsum((W Aᵀ) ∘ B) + s² rowsum((B A Aᵀ) ∘ B)

Paper: Liu et al. 2024, arXiv:2402.09353, eq. 5; the norm is held constant in the gradient (4.3).
Departs: with dropout in training, the base product is taken of the dropped input too, as PEFT does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multigraft.methods.contract import Method, Params, TensorSpec
from multigraft.variants.contract import Variant, variant

MAGNITUDE = "lora_magnitude_vector.weight"


@variant("dora")
class DoRA(Variant):
    """Direction by LoRA, magnitude by a vector of its own."""

    needs_weight = True
    needs_base = True
    combines = True
    takes_starts = True
    has_exact_gradients = False  # the norm is a constant to them, section 4.3 of the paper

    @classmethod
    def selected(cls, config: Any) -> bool:
        return bool(config.use_dora)

    def refusal(self, lora: Method) -> str | None:
        if lora.config.lora_bias:
            return "`use_dora` cannot be combined with `lora_bias`; leave one of them out"
        if lora.geometry.name == "experts":
            return "`use_dora` has no magnitude for stacked experts; leave it False for them"
        groups = getattr(lora.site.layer, "groups", 1)
        return (
            f"`use_dora` needs a convolution with `groups` 1, not {groups}" if groups > 1 else None
        )

    def tensors(self, lora: Method) -> dict[str, TensorSpec]:
        _, out = lora.geometry.sizes(lora.site.layer)
        spatial = -1 - lora.geometry.feature_axis(lora.site.layer)
        shape = (1, out, *(1,) * spatial) if spatial else (out,)
        return {MAGNITUDE: TensorSpec(shape, on_disk="lora_magnitude_vector")}

    def reset(self, lora: Method, params: Params) -> None:
        m = params[MAGNITUDE]
        if not m.is_meta:
            m.copy_(self._norm(lora, params, lora.site.weight()).reshape(m.shape))

    def add(
        self,
        lora: Method,
        params: Params,
        y: Tensor,
        x: Tensor,
        training: bool,
        base: Tensor | None,
    ) -> Tensor:
        assert base is not None
        W = lora.site.weight()
        g = lora.as_output_bias(params[MAGNITUDE].flatten() / self._norm(lora, params, W))
        layer = lora.site.layer
        if lora.dropout and training:
            x = F.dropout(x, lora.dropout)
            base = lora.geometry.run(layer, x, W.to(x.dtype))
        else:
            bias = getattr(layer, "bias", None)
            base = base if bias is None else base - lora.as_output_bias(bias).to(base.dtype)
        update = (g - 1) * base + g * lora.apply_factors(params, x)  # type: ignore[attr-defined]
        return y + update.to(y.dtype)

    def delta(self, lora: Method, params: Params, W: Tensor | None) -> Tensor:
        assert W is not None
        layer, geometry = lora.site.layer, lora.geometry
        product = geometry.product(layer, *_factors(lora, params)) * lora.scaling
        M = geometry.as_matrix(layer, W + product)
        g = params[MAGNITUDE].flatten() / M.detach().norm(dim=1)
        return geometry.from_matrix(layer, g[:, None] * M) - W

    @torch.no_grad()
    def _norm(self, lora: Method, params: Params, W: Tensor) -> Tensor:
        """‖W + s B A‖ per output feature, ``(out,)``, in at least float32."""
        A, B = (factor.flatten(1) for factor in _factors(lora, params))
        dtype = torch.promote_types(torch.promote_types(A.dtype, W.dtype), torch.float32)
        A, B = A.to(dtype), B.to(dtype)
        M = lora.geometry.as_matrix(lora.site.layer, W).to(dtype)
        s = lora.scaling
        cross = ((M @ A.T) * B).sum(1)
        square = (M * M).sum(1) + 2 * s * cross + s * s * ((B @ (A @ A.T)) * B).sum(1)
        return square.clamp_min(0).sqrt()


def _factors(lora: Method, params: Params) -> tuple[Tensor, Tensor]:
    A, B = lora.factors(params)  # type: ignore[attr-defined]
    return A, B
