"""A causal language model of some thousand parameters, with the demo's tokeniser and template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from multigraft.demo import model_path
from multigraft.train import Encoded, Pair

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
PAIRS = [(f"Input: {n}\nOutput:\n", f"{n * 7 % 100:03d}") for n in range(12)]


def write_base(folder: Path, *, template: bool = True, seed: int = 0, kv_heads: int = 1) -> Path:
    """A folder as `save_pretrained` writes it; without a chat template if so wished."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=1792,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=kv_heads,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(model_path() / name, folder / name)
    if not template:
        settings = json.loads((folder / TOKENIZER_FILES[1]).read_text())
        del settings["chat_template"]
        (folder / TOKENIZER_FILES[1]).write_text(json.dumps(settings))
    return folder


def write_lines(path: Path, rows: list[Any]) -> Path:
    """A JSONL file; a row that is a string goes in as it stands."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def pair_rows() -> list[dict[str, str]]:
    return [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS]


def chat_rows() -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": str(n)},
                {"role": "assistant", "content": completion},
            ]
        }
        for n, (_, completion) in enumerate(PAIRS)
    ]


def records() -> list[Pair]:
    return [Pair(prompt, completion) for prompt, completion in PAIRS]


def numbers(count: int, length: int = 6) -> list[Encoded]:
    """Examples of random token ids, the later half of each learned."""
    generator = torch.Generator().manual_seed(count)
    rows = torch.randint(2, 1792, (count, length), generator=generator).tolist()
    learned = [place >= length // 2 for place in range(length)]
    return [Encoded(row, learned) for row in rows]
