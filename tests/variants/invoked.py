"""A tiny causal language model with aLoRA adapters in both libraries, and rows to invoke them."""

from __future__ import annotations

from typing import Any

import peft
import torch
import transformers
from torch import Tensor

import multigraft
from multigraft import LoraConfig
from multigraft import PeftModel as Ours
from tests.methods.against_peft import filled
from tests.oracle import quiet

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 38,
    "eos_token_id": 39,
}
INVOCATION = [5, 6]
OPTIONS: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "task_type": "CAUSAL_LM",
    "alora_invocation_tokens": INVOCATION,
}
IDS = torch.tensor(
    [
        [1, 5, 6, 7, 5, 6, 9, 3],  # twice: the last one counts
        [1, 2, 3, 4, 7, 8, 9, 3],  # never
        [5, 6, 1, 2, 3, 4, 4, 5],  # from the first token on, and half of one at the end
        [0, 0, 0, 1, 2, 3, 5, 6],  # padded on the left, and nothing after it
        [7, 5, 6, 9, 1, 0, 0, 0],  # padded on the right
    ]
)
MASK = IDS.ne(0).long()
SPANS = [4, 0, 8, 2, 7]


def base(**more: Any) -> Any:
    """A tiny causal language model."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **more)).eval()


def both(**more: Any) -> tuple[Ours, Any]:
    """The same filled adapter in both libraries."""
    options = OPTIONS | more
    ours = multigraft.get_peft_model(base(), LoraConfig(**options)).eval()
    with quiet():
        theirs = peft.get_peft_model(base(), peft.LoraConfig(**options)).eval()
        state = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
        state = filled(state, 0.3)
        peft.set_peft_model_state_dict(theirs, state)
    multigraft.set_peft_model_state_dict(ours, state)
    return ours, theirs


def ours_alone(**more: Any) -> Ours:
    return both(**more)[0]


def add(model: Ours, name: str, seed: int, **options: Any) -> None:
    """One more filled adapter."""
    model.add_adapter(name, LoraConfig(**(OPTIONS | options)))
    state = multigraft.get_peft_model_state_dict(model, adapter_name=name)
    torch.manual_seed(seed)
    state = {key: 0.3 * torch.randn_like(value) for key, value in state.items()}
    multigraft.set_peft_model_state_dict(model, state, name)


def last(ids: Tensor, tokens: list[int]) -> int:
    """The span of one row, spelled out."""
    row = ids.tolist()
    starts = [i for i in range(len(row)) if row[i : i + len(tokens)] == tokens]
    return len(row) - starts[-1] if starts else 0
