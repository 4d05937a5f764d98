"""The model card beside an adapter's files: what the hub shows, and what readers look up there."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from multigraft.atomic import write_files, write_utf8
from multigraft.config import PeftConfig
from multigraft.errors import MissingExtraError

CARD_NAME = "README.md"


def new_card(config: PeftConfig) -> str:
    """The text of a fresh model card."""
    method = str(config.peft_type)
    base = config.base_model_name_or_path
    lines = ["---", *([f"base_model: {base}"] if base else []), "library_name: peft", "tags:"]
    lines += [*(f"- {tag}" for tag in _tags(config)), "---", "", f"# {method} adapter", ""]
    named = f"`{base}`" if base else "an unnamed base"
    lines += [f"An adapter for {named}, saved by Multigraft in PEFT's format.", ""]
    return "\n".join(lines)


def update_card(directory: str | os.PathLike[str], config: PeftConfig) -> None:
    """Let a directory's card say what adapter lies there; the rest of it stays.

    Raises:
        MissingExtraError: there is a card, and huggingface_hub, which reads it, is not installed.
    """
    path = Path(directory) / CARD_NAME
    text = _updated(path, config) if path.is_file() else new_card(config)
    write_files({path: partial(write_utf8, text=text)})


def _updated(path: Path, config: PeftConfig) -> str:
    try:
        from huggingface_hub import ModelCard
    except ImportError as error:
        raise MissingExtraError(
            f"{path}: changing a model card needs huggingface_hub: pip install 'multigraft[train]'."
        ) from error
    card = ModelCard(path.read_text("utf-8"), ignore_metadata_errors=True)
    card.data.library_name = "peft"
    if config.base_model_name_or_path:
        card.data.base_model = config.base_model_name_or_path
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *_tags(config)]))
    return str(card)


def _tags(config: PeftConfig) -> list[str]:
    return [str(config.peft_type).lower(), "multigraft"]
