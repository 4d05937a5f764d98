"""What stands beside a model's weights: config, tokeniser, chat template, generation settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from multigraft.merging.base import CONFIG, read_json
from multigraft.reading import check_inside

CARD = "README.md"
LEFT = (
    *(".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".ot", ".onnx", ".gguf", ".ckpt"),
    *(".index.json", ".md", ".lock"),
)
"""Endings of what is not carried: weights, and texts on the base."""
TOKENIZER = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", "vocab.json", "vocab.txt", "merges.txt"),
    *("spiece.model", "sentencepiece.bpe.model"),
)


def companions(base: Path, adapters: Sequence[Path]) -> dict[str, Path]:
    """Files to copy by name: the base's, and the tokeniser of the first adapter that has one."""
    found = {path.name: path for path in sorted(base.iterdir()) if _is_carried(path)}
    for folder in adapters:
        if (folder / "tokenizer_config.json").is_file():
            own = {name: folder / name for name in TOKENIZER if (folder / name).is_file()}
            found = {n: p for n, p in found.items() if n not in TOKENIZER} | own
            break
    for path in found.values():
        check_inside(path, path.parent)
    return found


def copy(files: dict[str, Path], target: Path) -> None:
    """Copy them; the config as it must be is another matter."""
    for name, path in files.items():
        shutil.copyfile(path, target / name)


def untie(folder: Path) -> None:
    """Let the config say that embedding and head have weights of their own."""
    values = read_json(folder / CONFIG)
    parts: list[Any] = [values, *values.values()]
    for part in parts:
        if part is values or (isinstance(part, dict) and "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")


def resize(folder: Path, rows: int) -> None:
    """Let the config say how many tokens there are."""
    values = read_json(folder / CONFIG)
    for part in [values, *values.values()]:
        if isinstance(part, dict) and "vocab_size" in part:
            part["vocab_size"] = rows
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")


def write_card(folder: Path, base: str, adapters: Sequence[str]) -> None:
    """A model card that says what was merged into what."""
    lines = ["---", f"base_model: {base}", "library_name: transformers", "tags:", "- multigraft"]
    lines += ["- merge", "---", "", "# Merged model", ""]
    lines += [f"`{base}` with these adapters merged into its weights by Multigraft:", ""]
    lines += [f"- `{adapter}`" for adapter in adapters]
    (folder / CARD).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _is_carried(path: Path) -> bool:
    is_plain = path.is_file() and not path.name.startswith((".", "adapter_"))
    return is_plain and not path.name.endswith(LEFT)
