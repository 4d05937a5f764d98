"""The model, the data and the single process that every strategy is compared with."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from multigraft import LoraConfig, PeftModel, get_peft_model

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROWS, TOKENS = 4, 6


def config(**options: Any) -> LlamaConfig:
    values = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 64,
        "attn_implementation": "eager",
        "use_cache": False,
        **options,
    }
    return LlamaConfig(**values)


def base(dtype: torch.dtype = torch.float64, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(config(**options)).to(dtype)


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}
    )


def adapted(model: torch.nn.Module, *names: str, **options: Any) -> PeftModel:
    """Adapters of these names, whose B is not zero; the first is active."""
    torch.manual_seed(1)
    config = lora(init_lora_weights=False, **options)
    names = names or ("default",)
    peft = get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        peft.add_adapter(name, config)
    return peft


def batch(step: int, rows: int = ROWS) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randint(0, 64, (rows, TOKENS), generator=generator)


def share(ids: Tensor) -> Tensor:
    """This rank's rows."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return ids.chunk(size)[rank]


def loss_of(model: Any, ids: Tensor, **options: Any) -> Tensor:
    """The mean over tokens, in the model's own precision."""
    logits = model(input_ids=ids, **options).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
