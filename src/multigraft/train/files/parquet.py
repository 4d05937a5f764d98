"""Parquet, read batch by batch; lines are rows."""

from __future__ import annotations

from pathlib import Path

from multigraft.train.files.contract import Row, Rows, needs, unreadable

SUFFIXES = (".parquet",)
BATCH = 256


def rows(path: Path) -> Rows:
    """One row after another.

    Raises:
        MissingExtraError: pyarrow is not installed.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise needs("pyarrow", path) from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(str(path), number, values)
    except ArrowException as error:
        raise unreadable(path, error) from error
