"""Which modules ``target_modules=None`` means, by ``model.config.model_type``.

The attention projections that each architecture's adapters usually take; the same choice as PEFT's,
so that a config without targets means the same adapter in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from multigraft.errors import TargetError, did_you_mean

_QV = ["q_proj", "v_proj"]
_FUSED = ["query_key_value"]
_BERT = ["query", "value"]

Targets = Mapping[str, list[str] | str]

LORA_TARGETS: Targets = {
    "bart": _QV,
    "bert": _BERT,
    "blip-2": ["q", "v", "q_proj", "v_proj"],
    "bloom": _FUSED,
    "btlm": ["c_proj", "c_attn"],
    "chatglm": _FUSED,
    "codegen": ["qkv_proj"],
    "deberta": ["in_proj"],
    "deberta-v2": ["query_proj", "value_proj"],
    "electra": _BERT,
    "falcon": _FUSED,
    "gemma": _QV,
    "gemma2": _QV,
    "gemma3_text": _QV,
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "gpt2": ["c_attn"],
    "gpt_bigcode": ["c_attn"],
    "gpt_neo": _QV,
    "gpt_neox": _FUSED,
    "gptj": _QV,
    "layoutlm": _BERT,
    "llama": _QV,
    "llama4": _QV,
    "mistral": _QV,
    "mixtral": _QV,
    "mpt": ["Wqkv"],
    "mt5": ["q", "v"],
    "nemotron_h": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "opt": _QV,
    "phi": ["q_proj", "v_proj", "fc1", "fc2"],
    "qwen2": _QV,
    "qwen3": _QV,
    "RefinedWeb": _FUSED,
    "RefinedWebModel": _FUSED,
    "roberta": _BERT,
    "rwkv": ["key", "value", "receptance", "output"],
    "rwkv7": ["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"],
    "stablelm": _QV,
    "t5": ["q", "v"],
    "xlm-roberta": _BERT,
}

TASK_HEADS: dict[str, tuple[str, ...]] = {
    "QUESTION_ANS": ("qa_outputs",),
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
}
"""Names of the heads that a task's adapters train whole, where the model has them: transformers
initialises these afresh, so a frozen one would be noise."""


def task_heads(model: nn.Module, usual: tuple[str, ...]) -> list[str]:
    """The task's usual heads, and what this model has beside them that is as fresh."""
    return [*usual, *(name for name in ("pre_classifier",) if usual and hasattr(model, name))]


def save_task_heads(config: Any, model: nn.Module, usual: tuple[str, ...]) -> None:
    """Let the model's own copy of a config train the task's heads, where it can."""
    if usual and hasattr(config, "modules_to_save"):
        heads = task_heads(model, usual)
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *heads]))


def default_targets(
    model: nn.Module, table: Targets = LORA_TARGETS, field: str = "target_modules"
) -> list[str] | str:
    """The usual targets of this model's architecture.

    Raises:
        TargetError: the model has no ``config.model_type``, or the table does not list it.
    """
    config = getattr(model, "config", None)
    kind = (
        config.get("model_type")
        if isinstance(config, dict)
        else getattr(config, "model_type", None)
    )
    if kind is None:
        raise TargetError(
            f"`{field}` (=None) stands for an architecture's usual modules, but this model "
            f"({type(model).__name__}) has no `config.model_type`. Name the modules, or use "
            '"all-linear".'
        )
    if kind not in table:
        raise TargetError(
            f"`{field}` (=None): no usual modules are known for `model_type` (={kind!r})."
            f'{did_you_mean(kind, table)} Name the modules, or use "all-linear".'
        )
    return table[kind]
