"""JSON: a list of objects, an object that holds one such list, or, in truth, JSON Lines.

The file is in memory as a whole; the objects of a list are read one by one, so that each has a
line number and one that is broken is told by its place.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from multigraft.train.files import jsonl
from multigraft.train.files.contract import Row, Rows, as_object, decoded, opened
from multigraft.train.records import BadLine, Refusal

SUFFIXES = (".json",)
SPACE = " \t\r\n"


def rows(path: Path) -> Rows:
    """One row for each object of the list."""
    with opened(path) as stream:
        raw = stream.read().removeprefix(jsonl.BYTE_ORDER_MARK)
    try:
        text = decoded(raw)
    except Refusal as refusal:
        yield refusal.at(str(path), raw[: _first_wrong(raw)].count(b"\n") + 1)
        return
    start = _skip(text, 0)
    if text[start : start + 1] == "[":
        yield from _listed(str(path), text, start + 1)
        return
    whole = _whole(text)
    if whole is None:
        yield from jsonl.rows(path)
        return
    lists = [(key, value) for key, value in whole.items() if _is_rows(value)]
    if len(lists) == 1 and len(whole) < 4 and lists[0][0] not in ("messages", "conversations"):
        yield from _listed(str(path), text, _value_of(text, lists[0][0]) + 1)
    else:
        yield Row(str(path), text.count("\n", 0, start) + 1, whole)


def _listed(file: str, text: str, at: int) -> Rows:
    """The objects of a list from behind its bracket on."""
    decoder, line, counted = json.JSONDecoder(), 1, 0
    at = _skip(text, at)
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = decoder.raw_decode(text, at)
            after = _skip(text, end)
            if text[after : after + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, after)
        except (ValueError, RecursionError) as error:
            yield BadLine(
                file,
                getattr(error, "lineno", line),
                f"not valid JSON ({error})",
                "Mend the list there; what comes after that place was not read",
            )
            return
        try:
            yield Row(file, line, as_object(value))
        except Refusal as refusal:
            yield refusal.at(file, line)
        at = _skip(text, after + 1) if text[after] == "," else after


def _whole(text: str) -> dict[str, Any] | None:
    """The one object that the text is, or None."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _value_of(text: str, key: str) -> int:
    """Where the value of a key of the one object begins; the last one, as `json` reads it."""
    decoder, at, place = json.JSONDecoder(), _skip(text, 0), 0
    while text[at] != "}":
        name, at = decoder.raw_decode(text, _skip(text, at + 1))
        at = _skip(text, _skip(text, at) + 1)
        place = at if name == key else place
        at = _skip(text, decoder.raw_decode(text, at)[1])
    return place


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in SPACE:
        at += 1
    return at


def _first_wrong(raw: bytes) -> int:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return len(raw)
