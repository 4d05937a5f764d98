"""Files that PEFT saved: nothing is found in them, by themselves or against their base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

from multigraft import doctor
from tests import oracle
from tests.weaknesses import nets

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}


def llama() -> nn.Module:
    config = transformers.LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **SIZES)
    return transformers.LlamaForCausalLM(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(num_attention_heads=2, **SIZES)
    return transformers.BertForSequenceClassification(config)


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 2, **options})


Case = tuple[Callable[[], nn.Module], Any]
CASES: dict[str, Case] = {
    "all-linear": (llama, lora(target_modules="all-linear", task_type="CAUSAL_LM")),
    "usual targets": (llama, lora()),
    "dora": (llama, lora(use_dora=True)),
    "every bias": (bert, lora(bias="all", task_type="SEQ_CLS")),
    "own biases": (bert, lora(bias="lora_only", task_type="SEQ_CLS")),
    "bias of B": (llama, lora(lora_bias=True)),
    "patterns": (llama, lora(rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 3})),
    "embedding": (llama, lora(target_modules=["embed_tokens", "q_proj"])),
    "copies": (llama, lora(target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "tokens": (llama, lora(trainable_token_indices=[1, 2])),
    "pissa": (llama, lora(init_lora_weights="pissa")),
    "parameters": (llama, lora(target_parameters=["q_proj.weight"], target_modules=[])),
    "some layers": (llama, lora(target_modules=["q_proj"], layers_to_transform=[1])),
    "other layers": (nets.net, lora(target_modules=["conv", "up"], modules_to_save=["head"])),
    "vera": (llama, peft.VeraConfig(r=4)),
    "adalora": (llama, peft.AdaLoraConfig(total_step=10)),
    "prompt": (bert, peft.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS")),
    "prefix": (llama, peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
}


@pytest.mark.parametrize("which", CASES)
def test_nothing_is_found(which: str, tmp_path: Path) -> None:
    make, config = CASES[which]
    torch.manual_seed(0)
    with oracle.quiet():
        model = peft.get_peft_model(make(), config)
        with torch.no_grad():
            for parameter in filter(lambda p: p.requires_grad, model.parameters()):
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path)
    for base in (None, make()):
        found = doctor(tmp_path, base)
        assert found.is_healthy, str(found)
        assert not found.notes, str(found)
