"""A tiny Llama, a tiny data set, and transformers' `Trainer` on them; without PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from multigraft import LoraConfig

STEPS = 4


class Rows(torch.utils.data.Dataset):
    """Seeded rows of tokens with labels, and a column that no model takes."""

    def __init__(self, count: int = 8) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, 40, (count, 8), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.ids[index]
        return {"input_ids": row, "labels": row.clone(), "stranger": torch.tensor(index)}


def config(**more: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj", "down_proj"], **more)


def base() -> nn.Module:
    """The same Llama each time, and what is drawn after it."""
    sizes = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(sizes)


def trainer(
    model: nn.Module,
    folder: Path,
    kind: type[transformers.Trainer] = transformers.Trainer,
    **options: Any,
) -> transformers.Trainer:
    """A trainer that saves and evaluates after each of four steps."""
    defaults: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    arguments = transformers.TrainingArguments(output_dir=str(folder), **{**defaults, **options})
    return kind(model, arguments, train_dataset=Rows(), eval_dataset=Rows(4))
