"""JSON Lines: one object a line; empty lines are passed over."""

from __future__ import annotations

from pathlib import Path

from multigraft.train.files.contract import Row, Rows, opened, parse
from multigraft.train.records import Refusal

SUFFIXES = (".jsonl", ".ndjson")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def rows(path: Path) -> Rows:
    """One row a line, of which only the present one is in memory."""
    file = str(path)
    with opened(path) as stream:
        for number, raw in enumerate(stream, start=1):
            line = raw.removeprefix(BYTE_ORDER_MARK) if number == 1 else raw
            if not line.strip():
                continue
            try:
                yield Row(file, number, parse(line.rstrip(b"\r\n")))
            except Refusal as refusal:
                yield refusal.at(file, number)
