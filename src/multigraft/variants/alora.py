"""Activated LoRA (aLoRA): a pair that acts from its invocation tokens on.

    y_t = W x_t                        before the last invocation in the row
    y_t = W x_t + scaling * B A x_t    from its first token on

Keys and values before the invocation are the base's, so that its cache serves every such adapter.
Which tokens these are is a matter of the call (`multigraft.spans`), not of the site.

Paper: Greenewald et al. 2025, arXiv:2504.12397.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from multigraft.config import require
from multigraft.draws import dropout
from multigraft.methods.contract import Method, Params
from multigraft.variants.contract import Variant, variant


@variant("alora")
class ALora(Variant):
    """LoRA's pair; the layer says where it acts."""

    by_token = True
    mergeable = False
    combines = True  # what reads the same tokens adds up
    takes_starts = True

    @classmethod
    def selected(cls, config: Any) -> bool:
        return config.alora_invocation_tokens is not None

    @classmethod
    def check(cls, config: Any) -> None:
        tokens = config.alora_invocation_tokens
        if tokens is None:
            return
        is_list = isinstance(tokens, (list, tuple)) and len(tokens) > 0
        are_ids = is_list and all(
            isinstance(t, int) and not isinstance(t, bool) and t >= 0 for t in tokens
        )
        required = "the ids of the invocation's tokens, in order: a list of integers from 0"
        require(are_ids, "LoraConfig", "alora_invocation_tokens", tokens, required)
        config.alora_invocation_tokens = list(tokens)

    def model_refusal(self, config: Any, model: nn.Module) -> str | None:
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            return (
                "`alora_invocation_tokens` are looked for in what a decoder reads, and this model "
                "has an encoder; use plain LoRA for it"
            )
        words: Any = getattr(model, "get_input_embeddings", lambda: None)()
        known = getattr(words, "num_embeddings", math.inf)
        above = [t for t in config.alora_invocation_tokens if t >= known]
        if above:
            return (
                f"`alora_invocation_tokens` holds {above[0]}, and the model's tokens end at "
                f"{known - 1}; give ids of its tokenizer, or resize its embeddings first"
            )
        return None

    def refusal(self, lora: Method) -> str | None:
        if not lora.geometry.is_matmul or lora.site.rebinds:
            return (
                "`alora_invocation_tokens` is for linear layers that run; leave this one out with "
                "`exclude_modules`"
            )
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
        if lora.dropout and training:
            x = dropout(x, lora.dropout)
        return y + lora.apply_factors(params, x).to(y.dtype)  # type: ignore[attr-defined]

    def delta(self, lora: Method, params: Params, W: Tensor | None) -> Tensor:
        """What is added to the weight for the tokens that it acts on."""
        return lora.geometry.product(lora.site.layer, *self.pair(lora, params)) * lora.scaling
