"""The same tiny model twice with the same context adapter, by Multigraft and by PEFT."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import Tensor, nn

import multigraft
from tests import oracle

METHODS: dict[str, dict[str, Any]] = {
    "prompt": {"kind": "PromptTuningConfig", "num_virtual_tokens": 3},
    "p_tuning": {"kind": "PromptEncoderConfig", "num_virtual_tokens": 3, "encoder_hidden_size": 12},
    "p_tuning_lstm": {
        "kind": "PromptEncoderConfig",
        "num_virtual_tokens": 3,
        "encoder_reparameterization_type": "LSTM",
        "encoder_num_layers": 1,
    },
    "prefix": {"kind": "PrefixTuningConfig", "num_virtual_tokens": 3},
    "projected_prefix": {
        "kind": "PrefixTuningConfig",
        "num_virtual_tokens": 3,
        "prefix_projection": True,
        "encoder_hidden_size": 12,
    },
    "adaption": {"kind": "AdaptionPromptConfig", "adapter_len": 3, "adapter_layers": 2},
}

MODELS = {
    "llama": (oracle.llama, "CAUSAL_LM"),
    "gpt2": (oracle.gpt2, "CAUSAL_LM"),
    "gemma": (oracle.gemma, "CAUSAL_LM"),
    "t5": (oracle.t5, "SEQ_2_SEQ_LM"),
    "llama_classifier": (oracle.llama_classifier, "SEQ_CLS"),
    "bert_classifier": (oracle.bert_classifier, "SEQ_CLS"),
    "bert_tagger": (oracle.bert_tagger, "TOKEN_CLS"),
    "bert_reader": (oracle.bert_reader, "QUESTION_ANS"),
    "bert_encoder": (oracle.bert_encoder, "FEATURE_EXTRACTION"),
}

TABLES = tuple(name for name in METHODS if name != "adaption")
TOKENS = ("prompt", "p_tuning", "p_tuning_lstm")
GENERATORS = ("llama", "gpt2", "gemma", "t5")
PAIRS = [(m, x) for m in TABLES for x in MODELS] + [("adaption", "llama"), ("adaption", "gpt2")]


def options(method: str, model: str, **more: Any) -> dict[str, Any]:
    """The config of this method for this model's task."""
    return {**METHODS[method], "task_type": MODELS[model][1], **more}


def ours(method: str, model: str, **more: Any) -> Any:
    """The model with our adapter, in evaluation mode."""
    base = oracle.build(MODELS[model][0])
    torch.manual_seed(5)
    adapted = multigraft.get_peft_model(base, oracle.our_config(options(method, model, **more)))
    return opened(adapted.eval())


def theirs(method: str, model: str, **more: Any) -> Any:
    """The model with PEFT's adapter, which starts with the same values."""
    base = oracle.build(MODELS[model][0])
    torch.manual_seed(5)
    with oracle.quiet():
        adapted = peft.get_peft_model(base, oracle.peft_config(options(method, model, **more)))
    return opened(adapted.eval())


def pair(method: str, model: str, **more: Any) -> oracle.Pair:
    """Both, and a batch with labels."""
    made = oracle.Pair(ours(method, model, **more), theirs(method, model, **more), {})
    made.batch = labelled(made.ours, MODELS[model][1])
    return made


def opened(model: Any) -> Any:
    """With every gate of an adaption prompt opened, since a shut one hides its prompt."""
    for name, parameter in model.named_parameters():
        if name.endswith("adaption_gate"):
            nn.init.constant_(parameter, 0.7)
    return model


def labelled(model: nn.Module, task: str, rows: int = 3) -> dict[str, Tensor]:
    """A batch without padding, with what the task's loss needs."""
    batch = oracle.inputs(model, rows)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    source = torch.Generator().manual_seed(11)
    if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        batch["labels"] = batch["input_ids"].clone()
        batch.pop("decoder_input_ids", None)
    elif task == "SEQ_CLS":
        batch["labels"] = torch.randint(0, 3, (rows,), generator=source)
    elif task == "TOKEN_CLS":
        batch["labels"] = torch.randint(0, 3, (rows, oracle.TOKENS), generator=source)
    elif task == "QUESTION_ANS":
        batch["start_positions"] = torch.randint(0, 4, (rows,), generator=source)
        batch["end_positions"] = torch.randint(4, oracle.TOKENS, (rows,), generator=source)
    return batch


def unlabelled(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what a loss needs."""
    needed = ("input_ids", "attention_mask", "decoder_input_ids")
    return {name: tensor for name, tensor in batch.items() if name in needed}


def result(model: nn.Module, batch: dict[str, Tensor], name: str = "logits") -> Tensor:
    """One part of what the model's forward gives."""
    given = model(**batch)
    return getattr(given, name) if hasattr(given, name) else given[0]
