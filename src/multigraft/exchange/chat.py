"""The tokeniser's files that go with an adapter, and what they say of chats."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from multigraft.errors import CheckpointError
from multigraft.exchange.contract import Files, Outcome
from multigraft.reading import check_inside, read_config

TEMPLATE = "chat_template.jinja"
SETTINGS = "tokenizer_config.json"
GENERATION = "generation_config.json"
CARRIED = (
    TEMPLATE,
    SETTINGS,
    GENERATION,
    "tokenizer.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)
TEMPLATE_BYTES = 1 << 20


@dataclass
class Chat:
    """How chats are written, and where answers end.

    Args:
        template: Jinja's text; empty where there is none.
        bos, eos: tokens that begin a text and end an answer; empty where they are not known.
        folder: where this stands.
    """

    template: str = ""
    bos: str = ""
    eos: str = ""
    folder: Path | None = None
    files: list[Path] = field(default_factory=list)


def chat_of(folders: Iterable[str | Path | None]) -> Chat:
    """What the first folder that has a tokeniser says."""
    for each in folders:
        folder = Path(each).expanduser() if each else None
        if folder is None or not folder.is_dir():
            continue
        files = [folder / name for name in CARRIED if (folder / name).is_file()]
        if not any(path.name in (TEMPLATE, SETTINGS) for path in files):
            continue
        for path in files:
            check_inside(path, folder)
        settings = read_config(folder / SETTINGS) if folder / SETTINGS in files else {}
        template = _template(settings.get("chat_template"))
        if folder / TEMPLATE in files:
            template = _text(folder / TEMPLATE)
        bos, eos = (_token(settings.get(f"{kind}_token")) for kind in ("bos", "eos"))
        return Chat(template, bos, eos, folder, files)
    return Chat()


def carried(chat: Chat, target: Path, outcome: Outcome) -> Files:
    """The tokeniser's files, to stand beside the adapter's."""
    if chat.folder is None:
        outcome.notes.append(
            "no tokeniser lies with the adapter, so the base's own chat template counts"
        )
        return {}
    said = "the chat template and " if chat.template else ""
    outcome.done.append(f"carried {said}the tokeniser's files along")
    return {target / path.name: partial(_copy, path) for path in chat.files}


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def _text(path: Path) -> str:
    if path.stat().st_size > TEMPLATE_BYTES:
        raise CheckpointError(
            f"{path} has more than {TEMPLATE_BYTES:,} bytes, which no chat template needs. Remove "
            "or replace it."
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as text ({error}).") from error


def _template(value: Any) -> str:
    """A template, or the default one of several."""
    if isinstance(value, list):
        named = {str(v.get("name")): v.get("template") for v in value if isinstance(v, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else ""


def _token(value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""
