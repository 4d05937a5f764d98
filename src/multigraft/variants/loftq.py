"""LoftQ: the layer runs with the weight as it will be quantised, and the pair makes up for it.

    y = Q x + b + s B A x        Q: the quantised weight, which the adapter holds in codes

So what is added to the base layer's own output is (Q - W) x + s B A x. Where Q comes from, and the
paper, is in `multigraft.initialisations.loftq`.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from multigraft import kernels
from multigraft.draws import dropout
from multigraft.kernels import AnyPart
from multigraft.methods.contract import Method, Params
from multigraft.variants.contract import Variant, variant


@variant("loftq")
class LoftQ(Variant):
    """Another weight in the base's place, and the plain pair."""

    needs_weight = True
    needs_base = True
    identity_at_init = False

    @classmethod
    def selected(cls, config: Any) -> bool:
        return str(config.init_lora_weights).lower() == "loftq"

    def refusal(self, lora: Method) -> str | None:
        if lora.config.lora_bias:
            return '`init_lora_weights="loftq"` has no `lora_bias`; leave one of them out'
        return None

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
        layer, Q = lora.site.layer, _quantised(lora, params)
        bias = getattr(layer, "bias", None)
        base = base if bias is None else base - lora.as_output_bias(bias).to(base.dtype)
        change = lora.geometry.run(layer, x, Q.to(x.dtype)) - base
        seen = dropout(x, lora.dropout) if lora.dropout and training else x
        own = lora.apply_factors(params, seen)  # type: ignore[attr-defined]
        return y + (change + own).to(y.dtype)

    def part(
        self, lora: Method, params: Params, W: Tensor, bias: Tensor | None, training: bool
    ) -> AnyPart | None:
        layer = lora.site.layer
        Q = lora.geometry.as_matrix(layer, _quantised(lora, params)).to(W.dtype)
        A, B = self.pair(lora, params)
        return kernels.Part(Q, bias, (A,), (B,), (lora.scaling,))

    def delta(self, lora: Method, params: Params, W: Tensor | None) -> Tensor:
        assert W is not None
        product = lora.geometry.product(lora.site.layer, *self.pair(lora, params))
        return _quantised(lora, params).to(W.dtype) - W + (product * lora.scaling).to(W.dtype)


def _quantised(lora: Method, params: Params) -> Tensor:
    """Q in the weight's layout."""
    return cast(Tensor, lora.start.quantised(lora, params))  # type: ignore[attr-defined]
