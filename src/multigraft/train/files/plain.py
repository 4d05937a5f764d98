"""Plain text: empty lines part one text from the next."""

from __future__ import annotations

from pathlib import Path

from multigraft.train.files.contract import Row, Rows, decoded, opened
from multigraft.train.files.jsonl import BYTE_ORDER_MARK
from multigraft.train.records import Refusal

SUFFIXES = (".txt",)


def rows(path: Path) -> Rows:
    """A row with the key ``text`` for each stretch of lines, known by its first line."""
    first, held = 0, b""
    with opened(path) as stream:
        for number, raw in enumerate(stream, start=1):
            line = raw.removeprefix(BYTE_ORDER_MARK) if number == 1 else raw
            if line.strip():
                first, held = (first, held + line) if held else (number, line)
            elif held:
                yield from _one(str(path), first, held)
                held = b""
    if held:
        yield from _one(str(path), first, held)


def _one(file: str, line: int, raw: bytes) -> Rows:
    try:
        text = decoded(raw).replace("\r\n", "\n").removesuffix("\n")
        yield Row(file, line, {"text": text})
    except Refusal as refusal:
        yield refusal.at(file, line)
