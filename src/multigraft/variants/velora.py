"""Vector projected LoRA (VeLoRA): A is trained on activations that are kept as a few numbers.

    y = W x + s B A x        dA = s' (dy B)ᵀ x̂,   x̂ = (x_g · e) e   for each group g of features

e: (size,), ``lora_velora_embed``, of unit length. Outputs, merges and all other gradients are
LoRA's; see `multigraft.kernels.compressed`.

Paper: Miles et al. 2024, arXiv:2405.17991, algorithm 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from multigraft import kernels
from multigraft.config import check_choice, require
from multigraft.draws import dropout
from multigraft.methods.contract import Method, Params, TensorSpec
from multigraft.variants._plain import add_bias, add_pair, factors, only_linear
from multigraft.variants.contract import Variant, variant

PROJECTION = "lora_velora_embed"


@dataclass
class VeloraConfig:
    """VeLoRA's options, under PEFT's names.

    Args:
        num_groups: parts that the input's features are split into; more keep more of it.
        scale: what the rebuilt activations are multiplied by.
        init_type: where the projection comes from: ``"batch_average"`` (each batch's mean),
            ``"batch_average_once"`` (the first batch's mean) or ``"random"``.
    """

    num_groups: int = 64
    scale: float = 1.0
    init_type: str = "batch_average"

    def __post_init__(self) -> None:
        where, n, scale = "VeloraConfig", self.num_groups, self.scale
        is_count = isinstance(n, int) and not isinstance(n, bool) and n > 0
        require(is_count, where, "num_groups", n, "an integer of at least 1")
        is_scale = isinstance(scale, (int, float)) and 0 < scale < math.inf
        require(is_scale, where, "scale", scale, "a number above 0")
        kinds = ("batch_average", "batch_average_once", "random")
        check_choice(where, "init_type", self.init_type, kinds)


@variant("velora")
class VeLoRA(Variant):
    """LoRA that keeps less for its backward pass."""

    option = "velora_config"
    options = VeloraConfig
    has_exact_gradients = False  # dA is an estimate
    takes_starts = True

    @classmethod
    def selected(cls, config: Any) -> bool:
        return config.velora_config is not None

    def refusal(self, lora: Method) -> str | None:
        return only_linear(lora, "`velora_config`")

    def tensors(self, lora: Method) -> dict[str, TensorSpec]:
        in_, _ = lora.geometry.sizes(lora.site.layer)
        size = kernels.group_size(in_, lora.config.velora_config.num_groups)
        return {PROJECTION: TensorSpec((size,), trainable=False, buffer=True)}

    def reset(self, lora: Method, params: Params) -> None:
        e = params[PROJECTION]
        if lora.config.velora_config.init_type == "random":
            e.copy_(_unit(nn.init.normal_(torch.empty_like(e))))
        else:
            e.zero_()  # no batch has been seen

    def low_rank(self, lora: Method, params: Params) -> tuple[Tensor, Tensor, float]:
        return (*factors(lora, params), lora.scaling)

    def trains_as_pair(self, lora: Method) -> bool:
        return False

    def add(
        self,
        lora: Method,
        params: Params,
        y: Tensor,
        x: Tensor,
        training: bool,
        base: Tensor | None,
    ) -> Tensor:
        A, B = factors(lora, params)
        if lora.dropout and training:
            x = dropout(x, lora.dropout)
        if not (training and torch.is_grad_enabled()):
            return add_bias(lora, params, add_pair(lora, y, x, A, B, lora.scaling))
        options = lora.config.velora_config
        e = self._projection(options, params[PROJECTION], x)
        h = kernels.compressed_linear(x, A.to(x.dtype), e, options.num_groups, options.scale)
        own = lora.geometry.lift(lora.site.layer, h, B.to(h.dtype)) * lora.scaling
        return add_bias(lora, params, y + own.to(y.dtype))

    def delta(self, lora: Method, params: Params, W: Tensor | None) -> Tensor:
        return lora.geometry.product(lora.site.layer, *factors(lora, params)) * lora.scaling

    @staticmethod
    @torch.no_grad()
    def _projection(options: VeloraConfig, held: Tensor, x: Tensor) -> Tensor:
        """The projection for this batch, which is kept for the next ones and for the file."""
        is_seen = options.init_type == "batch_average_once" and bool(held.any())
        if options.init_type != "random" and not is_seen:
            held.copy_(_unit(kernels.grouped_features(x, options.num_groups).mean((0, 1))))
        # A copy: the next forward writes into the buffer before this one's backward reads it.
        return held.clone()


def _unit(vector: Tensor) -> Tensor:
    """Scaled to length one, in float32; all ones where there is no direction."""
    wide = vector.float()
    norm = torch.linalg.vector_norm(wide)
    wide = torch.where(norm > 0, wide, torch.ones_like(wide))
    return wide / torch.linalg.vector_norm(wide)
