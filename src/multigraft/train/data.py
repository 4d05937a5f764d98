"""Training data as people have it: JSONL files of prompt/completion pairs or of conversations.

    {"prompt": "the first of May, 1999", "completion": "1999-05-01"}
    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}

Every line that cannot be used is reported with its number, the reason and the remedy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from multigraft.errors import DataError, did_you_mean

ROLES = ("system", "user", "assistant", "tool")
SHOWN = 10
"""How many bad lines an error message lists; the report holds them all."""


@dataclass(frozen=True)
class Pair:
    """A prompt and the text that should follow it, both used as they stand."""

    prompt: str
    completion: str
    line: int = 0


@dataclass(frozen=True)
class Chat:
    """A conversation; the assistant's turns are what is learned."""

    messages: tuple[dict[str, str], ...]
    line: int = 0


Record = Pair | Chat


@dataclass(frozen=True)
class BadLine:
    """A line that cannot be used: where, why, and what to do about it."""

    file: str
    line: int
    why: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.why}. {self.remedy}."


@dataclass
class Records:
    """What a file holds: the usable records, and a report of the other lines."""

    file: str
    good: list[Record] = field(default_factory=list)
    bad: list[BadLine] = field(default_factory=list)

    def check(self, *, skip_bad: bool = False) -> list[Record]:
        """The usable records.

        Raises:
            DataError: there are bad lines (unless ``skip_bad``), or no usable ones.
        """
        if self.bad and not (skip_bad and self.good):
            raise DataError(report(self.bad, len(self.good)))
        if not self.good:
            raise DataError(f"{self.file} holds no data. Give one JSON object a line.")
        return self.good


def report(bad: list[BadLine], good: int) -> str:
    """A message about the bad lines: one alone in a line, several listed, up to `SHOWN` of them.

    What is wrong with many lines in the same way is said once, at the first of them.
    """
    alike: dict[tuple[str, str, str], list[BadLine]] = {}
    for line in bad:
        alike.setdefault((line.file, line.why, line.remedy), []).append(line)
    lines = [_told(group) for group in alike.values()]
    count = f"{len(bad)} of {len(bad) + good} lines cannot be used"
    if len(lines) == 1:
        return f"{lines[0]} ({count}.)"
    more = [f"… and {len(lines) - SHOWN} more."] if len(lines) > SHOWN else []
    return "\n".join([f"{count}:", *lines[:SHOWN], *more])


def _told(alike: list[BadLine]) -> str:
    first, others = alike[0], len(alike) - 1
    also = f" (and {others} more like it)" if others else ""
    return f"{first.file}:{first.line}{also}: {first.why}. {first.remedy}."


def read_jsonl(path: str | os.PathLike[str]) -> Records:
    """Read a JSONL file of prompt/completion or ``messages`` lines; empty lines are passed over.

    Raises:
        DataError: there is no such file, or it cannot be read at all.
    """
    records = Records(str(path))
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        if not raw.strip():
            continue
        try:
            records.good.append(_record(raw, number))
        except _Refusal as refusal:
            records.bad.append(BadLine(records.file, number, *refusal.args))
    return records


def pairs(rows: Iterable[Any]) -> list[Pair]:
    """Pairs from anything with ``prompt`` and ``completion`` attributes."""
    return [Pair(row.prompt, row.completion, n) for n, row in enumerate(rows, start=1)]


class _Refusal(Exception):
    """Why a line cannot be used, and the remedy."""


def _record(raw: bytes, line: int) -> Record:
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _Refusal(f"byte {error.start + 1} is not UTF-8", "Save the file as UTF-8") from error
    except ValueError as error:
        why = f"not valid JSON ({error})"
        raise _Refusal(why, "Write one whole JSON object on each line") from error
    if not isinstance(row, dict):
        raise _Refusal(
            f"a JSON {_kind(row)}, not an object", 'Write {"prompt": …, "completion": …}'
        )
    if "messages" in row:
        return Chat(tuple(_messages(row["messages"])), line)
    prompt, completion = _text(row, "prompt"), _text(row, "completion")
    if not completion.strip():
        raise _Refusal("`completion` is empty, so there is nothing to learn", "Drop the line")
    return Pair(prompt, completion, line)


def _text(row: dict[str, Any], key: str) -> str:
    if key not in row:
        hint = did_you_mean(key, row) or f" Its keys are {', '.join(f'`{k}`' for k in row)}."
        remedy = "Each line needs `prompt` and `completion`, or `messages`"
        raise _Refusal(f"`{key}` is missing", f"{remedy}.{hint if row else ''}".rstrip("."))
    if not isinstance(row[key], str):
        raise _Refusal(f"`{key}` is a JSON {_kind(row[key])}, not a string", "Put it in quotes")
    return str(row[key])


def _messages(value: Any) -> Iterator[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise _Refusal(
            "`messages` is not a list of turns", "Give a list of {role, content} objects"
        )
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
            why = f"turn {number} of `messages` has no text in `content`"
            raise _Refusal(why, 'Write {"role": …, "content": "…"}; only text can be trained on')
        role = turn.get("role")
        if role not in ROLES:
            why = f"turn {number} of `messages` has the `role` {role!r}"
            hint = did_you_mean(str(role), ROLES).rstrip(".")
            raise _Refusal(why, f"Roles are {', '.join(ROLES)}.{hint}".rstrip("."))
        yield {"role": role, "content": turn["content"]}
    if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in value):
        raise _Refusal("no assistant turn with text, so there is nothing to learn", "Drop the line")


def _kind(value: Any) -> str:
    kinds = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return kinds.get(type(value), "number")
