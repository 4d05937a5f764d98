"""Infused adapter by inhibiting and amplifying inner activations (IA3).

    y = l * (W x + b)      l: (out, 1)      at keys and values
    y = W (l * x) + b      l: (1, in)       at feed-forward layers

Paper: Liu et al. 2022, arXiv:2205.05638, section 3.3.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from multigraft.config import PeftType, TargetedConfig
from multigraft.defaults import Targets, default_targets
from multigraft.methods.contract import Method, Params, TensorSpec, method
from multigraft.site import Site

_KV = ["k_proj", "v_proj"]
_QV = ["q_proj", "v_proj"]
_GATED = ("gemma", "gemma2", "gemma3_text", "llama4", "qwen2", "qwen3")
_FUSED = ["query_key_value", "dense_4h_to_h"]

FEEDFORWARD: Targets = {
    "bart": ["fc2"],
    "bert": ["output.dense"],
    "bloom": ["mlp.dense_4h_to_h"],
    "deberta": ["output.dense"],
    "deberta-v2": ["output.dense"],
    "falcon": ["dense_4h_to_h"],
    "gpt2": ["mlp.c_proj"],
    "gpt_bigcode": ["mlp.c_proj"],
    "gpt_neo": ["c_proj"],
    "gpt_neox": ["dense_4h_to_h"],
    "gptj": ["fc_out"],
    "mixtral": ["w2"],
    "mt5": [],
    "opt": ["fc2"],
    "phi": ["fc2"],
    "RefinedWeb": ["dense_4h_to_h"],
    "RefinedWebModel": ["dense_4h_to_h"],
    "roberta": ["output.dense"],
    "t5": ["wo"],
} | {name: ["down_proj"] for name in (*_GATED, "llama", "mistral")}

TARGETS: Targets = {
    "bart": [*_QV, "fc2"],
    "bert": ["key", "value", "output.dense"],
    "bloom": ["query_key_value", "mlp.dense_4h_to_h"],
    "deberta": ["in_proj", "output.dense"],
    "deberta-v2": ["key_proj", "value_proj", "output.dense"],
    "falcon": _FUSED,
    "gpt2": ["c_attn", "mlp.c_proj"],
    "gpt_bigcode": ["c_attn", "mlp.c_proj"],
    "gpt_neo": [*_QV, "c_proj"],
    "gpt_neox": _FUSED,
    "gptj": [*_QV, "fc_out"],
    "llama": [*_KV, "down_proj"],
    "mistral": [*_KV, "down_proj"],
    "mixtral": [*_KV, "w2"],
    "mt5": ["k", "v", "wi_1"],
    "opt": ["q_proj", "k_proj", "fc2"],
    "phi": [*_QV, "fc2"],
    "RefinedWeb": _FUSED,
    "RefinedWebModel": _FUSED,
    "roberta": ["key", "value", "output.dense"],
    "t5": ["k", "v", "wo"],
} | {name: [*_QV, "down_proj"] for name in _GATED}


@dataclass
class IA3Config(TargetedConfig):
    """IA3's options, under PEFT's names.

    Args:
        feedforward_modules: the targets whose *input* is scaled: names or a regular expression;
            None for the architecture's usual ones.
        fan_in_fan_out: kept for the file format; the layer's own type says how it is stored.
        init_ia3_weights: start at ones, which changes nothing; False starts at random.
    """

    peft_type: str | PeftType | None = PeftType.IA3
    feedforward_modules: list[str] | str | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True

    _ours_only: ClassVar[frozenset[str]] = frozenset({"layers_to_transform", "layers_pattern"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.feedforward_modules, (set, frozenset)):
            self.feedforward_modules = sorted(self.feedforward_modules)


@method("IA3", config=IA3Config, paper="arXiv:2205.05638")
class IA3(Method):
    """One vector that scales the layer's output, or its input."""

    prefix = "ia3_"
    kind = "map"
    geometries = frozenset({"linear", "conv1d_transposed", "conv"})
    default_targets = TARGETS

    def __init__(self, site: Site, config: IA3Config) -> None:
        super().__init__(site, config)
        wanted = config.feedforward_modules or []
        if isinstance(wanted, str):
            self.is_feedforward = re.fullmatch(wanted, site.path) is not None
        else:
            self.is_feedforward = any(site.path.endswith(name) for name in wanted)

    @classmethod
    def complete(cls, config: IA3Config, model: nn.Module) -> None:
        if config.feedforward_modules is None:
            config.feedforward_modules = default_targets(model, FEEDFORWARD, "feedforward_modules")

    def tensors(self) -> dict[str, TensorSpec]:
        in_, out = self.geometry.sizes(self.site.layer)
        spatial = -1 - self.geometry.feature_axis(self.site.layer)
        if spatial:
            shape = (1, in_ if self.is_feedforward else out, *(1,) * spatial)
        else:
            shape = (1, in_) if self.is_feedforward else (out, 1)
        return {"ia3_l": TensorSpec(shape)}

    def reset(self, params: Params) -> None:
        if self.config.init_ia3_weights:
            nn.init.ones_(params["ia3_l"])
        else:
            nn.init.normal_(params["ia3_l"])

    def input(self, params: Params, x: Tensor) -> Tensor:
        return self._scaled(params, x) if self.is_feedforward else x

    def output(self, params: Params, y: Tensor) -> Tensor:
        return y if self.is_feedforward else self._scaled(params, y)

    def _scaled(self, params: Params, x: Tensor) -> Tensor:
        return x * self.as_output_bias(params["ia3_l"].flatten()).to(x.dtype)
