"""The contract of a kind of file: a function from a path to rows, read one after another."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from multigraft.errors import DataError, MissingExtraError
from multigraft.registry import Registry
from multigraft.train.formats.contract import kind
from multigraft.train.records import BadLine, Refusal


@dataclass(frozen=True)
class Row:
    """What one line holds.

    Args:
        file: where it comes from.
        line: its number from 1, in a file of lines; of the row, in a table without lines.
    """

    file: str
    line: int
    values: dict[str, Any]


Rows = Iterator[Row | BadLine]
Reader = Callable[[Path], Rows]

READERS: Registry[Reader] = Registry("kind of file")
"""Readers by the end of the file's name, ``".jsonl"``."""


def opened(path: Path) -> IO[bytes]:
    """A file's bytes, unpacked where its name ends in ``.gz``."""
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    return open(path, "rb")


def parse(raw: bytes) -> dict[str, Any]:
    """The JSON object that these bytes are.

    Raises:
        Refusal: they are not UTF-8, not JSON, or something else than an object.
    """
    try:
        return as_object(json.loads(decoded(raw)))
    except (ValueError, RecursionError) as error:
        why = f"not valid JSON ({error})"
        raise Refusal(why, "Write one whole JSON object on each line") from error


def as_object(value: Any) -> dict[str, Any]:
    """The value itself, if it is an object.

    Raises:
        Refusal: it is not.
    """
    if not isinstance(value, dict):
        raise Refusal(f"{kind(value)}, not an object", 'Write {"prompt": …, "completion": …}')
    return value


def decoded(raw: bytes) -> str:
    """The text of these bytes.

    Raises:
        Refusal: they are not UTF-8.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refusal(f"byte {error.start + 1} is not UTF-8", "Save the file as UTF-8") from error


def needs(package: str, source: str | os.PathLike[str]) -> MissingExtraError:
    """The error for a package that this source cannot be read without."""
    return MissingExtraError(
        f"{os.fspath(source)} needs {package}, which is not installed: "
        "pip install 'multigraft[data]'"
    )


def unreadable(path: str | os.PathLike[str], error: Exception) -> DataError:
    """The error for a file that cannot be read at all, or not to its end."""
    said = getattr(error, "strerror", None) or str(error).partition("\n")[0]
    return DataError(f"{os.fspath(path)} cannot be read: {str(said).rstrip('.')}.")
