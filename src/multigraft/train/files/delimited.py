"""CSV and TSV: a header with the names of the columns, then one row a record."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path

from multigraft.train.files.contract import Row, Rows, opened, unreadable
from multigraft.train.records import BadLine

SUFFIXES = (".csv", ".tsv")


def rows(path: Path) -> Rows:
    """One row a record; a record in quotes may span lines, and is known by its first."""
    # Conversations are longer than the 128 KiB at which Python's reader gives up.
    csv.field_size_limit(max(csv.field_size_limit(), min(sys.maxsize, 2**31 - 1)))
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    with opened(path) as raw, io.TextIOWrapper(raw, "utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            for line, cells in _records(reader):
                yield _row(str(path), line, header, cells)
        except csv.Error as error:
            why = f"not valid CSV ({error})"
            remedy = "Mend the quotes there; what comes after that place was not read"
            yield BadLine(str(path), reader.line_num, why, remedy)
        except UnicodeDecodeError as error:
            raise unreadable(path, error) from error


def _records(reader: Iterator[list[str]]) -> Iterator[tuple[int, list[str]]]:
    line = reader.line_num + 1  # type: ignore[attr-defined]
    for cells in reader:
        if cells:
            yield line, cells
        line = reader.line_num + 1  # type: ignore[attr-defined]


def _row(file: str, line: int, header: list[str], cells: list[str]) -> Row | BadLine:
    if len(cells) != len(header):
        why = f"{len(cells)} cells under {len(header)} columns"
        return BadLine(file, line, why, "Put cells that hold separators in double quotes")
    return Row(file, line, dict(zip(header, cells, strict=True)))
