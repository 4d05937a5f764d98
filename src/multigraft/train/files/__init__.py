"""Kinds of files, one file each, by the end of a file's name; and directories, and the hub.

    READERS.register(".xml", rows)  # rows(path) yields a Row or a BadLine after another

adds one of your own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from multigraft.errors import DataError
from multigraft.train.files import delimited, json_list, jsonl, parquet, plain
from multigraft.train.files.contract import READERS, Reader, Row, Rows, unreadable
from multigraft.train.files.datasets_rows import hub_rows, is_hub_id, is_saved, saved_rows

for _kind in (jsonl, json_list, delimited, parquet, plain):
    for _suffix in _kind.SUFFIXES:
        READERS.register(_suffix, _kind.rows)

__all__ = ["READERS", "Reader", "Row", "Rows", "read_rows"]


def read_rows(source: str | os.PathLike[str]) -> Rows:
    """The rows of a file, of a directory, or of a data set on the hub, one after another.

    Raises:
        DataError: there is no such thing, or it cannot be read.
        MissingExtraError: a package that it needs is not installed.
    """
    name = os.fspath(source)
    path = Path(name).expanduser()
    if path.is_dir():
        yield from saved_rows(path) if is_saved(path) else _folder_rows(path)
        return
    reader = _reader(path)
    if not path.exists() and reader is None and is_hub_id(name):
        yield from hub_rows(name)
        return
    try:
        path.open("rb").close()  # one that is absent is absent, whatever its name ends in
        if reader is None:
            known = ", ".join(READERS)
            raise DataError(f"{name}: files of this kind are unknown. Known: {known}.")
        yield from reader(path)
    except (OSError, EOFError) as error:
        raise unreadable(name, error) from error


def _folder_rows(folder: Path) -> Rows:
    """The rows of all files of known kinds in a directory, in the order of their names."""
    files = list(_data_files(folder))
    if not files:
        raise DataError(f"{folder} holds no data files. Known kinds: {', '.join(READERS)}.")
    for file in files:
        yield from read_rows(file)


def _data_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith(".") and _reader(path) is not None:
            yield path


def _reader(path: Path) -> Reader | None:
    suffix = (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()
    return dict(READERS.items()).get(suffix)
