"""Training data as people have it: rows of many kinds of files, in many formats, as records.

    {"prompt": "the first of May, 1999", "completion": "1999-05-01"}
    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}

Rows are read one after another and never held together. Every line that cannot be used is reported
with its number, the reason and the remedy.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multigraft.train.files import jsonl, read_rows
from multigraft.train.files.contract import Rows, unreadable
from multigraft.train.formats import AUTO, Kinds, check_format, read_row
from multigraft.train.records import LANGUAGE, BadLine, Pair, Record, Records, Refusal


@dataclass(frozen=True)
class Found:
    """A record, and the file that it comes from."""

    file: str
    record: Record


def stream(
    source: str | os.PathLike[str], format: str = AUTO, kinds: Kinds = LANGUAGE
) -> Iterator[Found | BadLine]:
    """The records and the bad lines of a source, in their order, as they are read.

    Args:
        source: a file, a directory of files or of `datasets`, or an id on the hub.
        format: how its rows are written; ``"auto"`` goes by each row's keys.
        kinds: of records that can be used.

    Raises:
        DataError: there is no such source, or it cannot be read at all.
        MissingExtraError: a package that it needs is not installed.
        UnsupportedError: there is no such format, or it gives none of these kinds.
    """
    check_format(format, kinds)  # before anything is read
    return _records(read_rows(source), format, kinds)


def read(source: str | os.PathLike[str], format: str = AUTO, kinds: Kinds = LANGUAGE) -> Records:
    """All of what `stream` yields, in memory.

    Raises:
        DataError, MissingExtraError, UnsupportedError: as for `stream`.
    """
    return _gathered(str(source), stream(source, format, kinds))


def read_jsonl(path: str | os.PathLike[str]) -> Records:
    """Read a JSONL file, whatever its name; empty lines are passed over.

    Raises:
        DataError: there is no such file, or it cannot be read at all.
    """
    try:
        return _gathered(str(path), _records(jsonl.rows(Path(path)), AUTO, LANGUAGE))
    except OSError as error:
        raise unreadable(path, error) from error


def pairs(rows: Iterable[Any]) -> list[Pair]:
    """Pairs from anything with ``prompt`` and ``completion`` attributes."""
    return [Pair(row.prompt, row.completion, n) for n, row in enumerate(rows, start=1)]


def _records(rows: Rows, format: str, kinds: Kinds) -> Iterator[Found | BadLine]:
    for row in rows:
        if isinstance(row, BadLine):
            yield row
            continue
        try:
            yield Found(row.file, read_row(row.values, row.line, format, kinds))
        except Refusal as refusal:
            yield refusal.at(row.file, row.line)


def _gathered(source: str, found: Iterable[Found | BadLine]) -> Records:
    records = Records(source)
    for each in found:
        if isinstance(each, BadLine):
            records.bad.append(each)
        else:
            records.good.append(each.record)
    return records
