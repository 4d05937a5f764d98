"""LayerNorm tuning: the norms are trained, and nothing else.

    y = γ' ∘ normalise(x) + β'        γ', β': (features,), copies of the base norm's own

Paper: Zhao et al. 2023, "Tuning LayerNorm in Attention", arXiv:2312.11420.
Departs: PEFT trains a copy of whatever module is named, norm or not, and so do we.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from multigraft.config import PeftType, TargetedConfig
from multigraft.defaults import Targets
from multigraft.methods._copied_module import CopiedModule
from multigraft.methods.contract import method

_LLAMA = ["input_layernorm", "post_attention_layernorm", "norm"]
_SANDWICH = [*_LLAMA, "pre_feedforward_layernorm", "post_feedforward_layernorm"]
_BLOOM = ["input_layernorm", "post_attention_layernorm", "ln_f"]
_T5 = ["layer_norm", "final_layer_norm"]

TARGETS: Targets = {
    "bart": ["self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"],
    "blip-2": ["layernorm", "LayerNorm", "final_layer_norm", "self_attn_layer_norm"],
    "bloom": _BLOOM,
    "falcon": _BLOOM,
    "gemma": _LLAMA,
    "gemma2": _SANDWICH,
    "gemma3_text": _SANDWICH,
    "gpt2": ["ln_1", "ln_2", "ln_f"],
    "gptj": ["ln_1", "ln_f"],
    "llama": _LLAMA,
    "llava": ["multi_modal_projector", *_LLAMA, "embed_tokens", "lm_head"],
    "mistral": _LLAMA,
    "mt5": _T5,
    "phi": ["input_layernorm", "final_layernorm"],
    "qwen2": ["post_attention_layernorm"],
    "qwen3": ["post_attention_layernorm"],
    "t5": _T5,
}


@dataclass
class LNTuningConfig(TargetedConfig):
    """LayerNorm tuning has no options besides its targets; None means the architecture's norms."""

    peft_type: str | PeftType | None = PeftType.LN_TUNING

    _ours_only: ClassVar[frozenset[str]] = frozenset({"layers_to_transform", "layers_pattern"})


@method("LN_TUNING", config=LNTuningConfig, paper="arXiv:2312.11420")
class LNTuning(CopiedModule):
    """A trained copy of a norm in its place."""

    prefix = "ln_tuning_layers"
    asked_by = "target_modules"
    on_disk = "ln_tuning_layers."
    default_targets = TARGETS
