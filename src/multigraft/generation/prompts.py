"""What a model is asked: turns of a conversation, or plain text, and the tokens that it sees."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multigraft.errors import DataError
from multigraft.train import Chat, Pair, prompt_ids

JSON_ENDINGS = (".jsonl", ".ndjson", ".json")
Messages = tuple[dict[str, str], ...]


@dataclass(frozen=True)
class Prompt:
    """A question.

    Args:
        messages: turns of ``role`` and ``content``, the last of which is to be answered.
    """

    messages: Messages

    @staticmethod
    def of(text: str, system: str | None = None) -> Prompt:
        """What a user says, after what the system is told."""
        before = () if system is None else ({"role": "system", "content": system},)
        return Prompt((*before, {"role": "user", "content": text}))

    @property
    def text(self) -> str:
        """What is to be answered."""
        return self.messages[-1]["content"]

    def ids(self, tokenizer: Any, *, raw: bool = False) -> list[int]:
        """The tokens after which an answer begins.

        By the tokeniser's chat template, where it has one; else the turns' texts as they stand.

        Args:
            raw: as they stand in any case.

        Raises:
            DataError: the template refuses these turns.
        """
        if raw or not getattr(tokenizer, "chat_template", None):
            text = "\n".join(turn["content"] for turn in self.messages)
            return prompt_ids(Pair(text, ""), tokenizer)
        return prompt_ids(Chat((*self.messages, {"role": "assistant", "content": ""})), tokenizer)


def plain_prompts(lines: Iterable[str], system: str | None = None) -> list[Prompt]:
    """A prompt a line; empty lines are passed over."""
    return [Prompt.of(line.rstrip("\r\n"), system) for line in lines if line.strip()]


def read_prompts(path: Path, system: str | None = None) -> list[Prompt]:
    """Prompts from a file: JSON lines with ``prompt`` or ``messages``, or a line of text each.

    Raises:
        DataError: it cannot be read, or lines cannot be used; they are listed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}).") from error
    lines = text.splitlines()
    if path.suffix not in JSON_ENDINGS:
        return plain_prompts(lines, system)
    found, bad = [], []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            prompt = _of_row(line, system)
            if prompt is None:
                bad.append(number)
            else:
                found.append(prompt)
    if bad:
        more = f" and {len(bad) - 8} more" if len(bad) > 8 else ""
        raise DataError(
            f"{path}: lines {', '.join(map(str, bad[:8]))}{more} are no prompts. A line is a JSON "
            'object with text as "prompt", or with "messages" that end with a user\'s turn.'
        )
    return found


def _of_row(line: str, system: str | None) -> Prompt | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, Mapping):
        return None
    if isinstance(row.get("prompt"), str):
        return Prompt.of(row["prompt"], system)
    turns = row.get("messages")
    if not isinstance(turns, list) or not turns or not all(map(_is_turn, turns)):
        return None
    if turns[-1]["role"] == "assistant":  # a row of training data: its last turn is the answer
        turns = turns[:-1]
    own = tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)
    if not own:
        return None
    has_system = system is None or own[0]["role"] == "system"
    return Prompt(own if has_system else ({"role": "system", "content": system or ""}, *own))


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, Mapping) and all(
        isinstance(turn.get(key), str) for key in ("role", "content")
    )
