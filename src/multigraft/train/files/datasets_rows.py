"""What the package `datasets` reads: directories that it saved, and data sets on the hub."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from multigraft.errors import DataError, there_are
from multigraft.train.files.contract import Row, Rows, needs, unreadable

SAVED = ("state.json", "dataset_dict.json")
"""One of them lies in every directory that `datasets` saved."""
HUB_ID = re.compile(
    r"(?P<name>[\w-][\w.-]*(/[\w-][\w.-]*)?)(@(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+))?"
)


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote this directory."""
    return any((folder / name).is_file() for name in SAVED)


def saved_rows(folder: Path) -> Rows:
    """The rows of a directory that `save_to_disk` wrote; of several splits, those of ``train``.

    Raises:
        MissingExtraError: `datasets` is not installed.
        DataError: it cannot be read, or has splits and none is called ``train``.
    """
    datasets = _package(str(folder))
    try:
        data = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever a damaged directory makes it trip over
        raise unreadable(folder, error) from error
    if isinstance(data, dict):
        if "train" not in data:
            known = there_are(map(str, data))
            raise DataError(f"{folder} has no split `train`.{known} Give the directory of one.")
        data = data["train"]
    return _numbered(str(folder), data)


def hub_rows(source: str) -> Rows:
    """The rows of ``owner/name``, ``owner/name:split`` or ``owner/name@config:split``, streamed.

    Raises:
        MissingExtraError: `datasets` is not installed.
        DataError: there is no such data set.
    """
    datasets = _package(source)
    found = HUB_ID.fullmatch(source)
    assert found is not None, "is_hub_id comes first"
    split = found["split"] or "train"
    try:
        data = datasets.load_dataset(found["name"], found["config"], split=split, streaming=True)
    except Exception as error:  # of the network, the hub, and scripts in data sets
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{source} cannot be read: there is no such file or directory here, and from the hub "
            f"it could not be had ({first.rstrip('.')})."
        ) from error
    return _numbered(source, data)


def is_hub_id(source: str) -> bool:
    """Whether this can name a data set on the hub."""
    return "/" in source and HUB_ID.fullmatch(source) is not None


def _numbered(source: str, data: Iterable[Any]) -> Rows:
    for number, values in enumerate(data, start=1):
        yield Row(source, number, dict(values))


def _package(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise needs("datasets", source) from error
    return datasets
