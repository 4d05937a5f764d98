"""Safetensors files that are written tensor by tensor, in any order, into their final places.

The header is known before the first value, so the files have their size from the beginning, and no
tensor waits in memory for others.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multigraft.errors import CheckpointError
from multigraft.merging.mapped import INDEX, MappedWeights
from multigraft.reading import DTYPES
from multigraft.writing import METADATA

CODES = {dtype: code for code, dtype in DTYPES.items()}
ALIGNED = 8
CHUNK = 16 << 20


@dataclass
class Entry:
    """One tensor of a new file.

    Args:
        source: the base's key whose values it has until others are put in their place.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    source: str
    start: int = 0
    end: int = 0


@dataclass
class Output:
    """The files of a model that is the base but for some tensors.

    Args:
        folder: where they are written.
        base: the base's weights; the new files have its files' names, dtypes and order.
        added: further keys to the base's key whose values they start from; each goes into the file
            that holds that one.
        reshaped: the base's keys to new shapes; those that start from them have these as well, and
            all of them must be `put`.
    """

    folder: Path
    base: MappedWeights
    added: Mapping[str, str] = field(default_factory=dict)
    reshaped: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    files: dict[str, dict[str, Entry]] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)
    headers: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sources = {key: key for key in self.base} | dict(self.added)
        self.files = {name: {} for name in self.base.files}
        for key, source in sources.items():
            name = self.base.where[source]
            info = self.base.info(source)
            shape = self.reshaped.get(source, info.shape)
            size = math.prod(shape) * info.dtype.itemsize
            entry = Entry(info.dtype, shape, source, end=size)
            self.files[name][key] = entry
            self.where[key] = name
        for name, file in self.base.files.items():
            self.headers[name] = _header(self.files[name], file.header.metadata or METADATA)

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(
            len(self.headers[name]) + sum(e.end - e.start for e in entries.values())
            for name, entries in self.files.items()
        )

    def begin(self, later: Iterable[str]) -> None:
        """Make every file, with the base's values but for the keys that are `put` later."""
        later = set(later)
        for name, entries in self.files.items():
            with open(self.folder / name, "wb") as file:
                file.write(self.headers[name])
                for key, entry in entries.items():
                    if key in later:
                        file.seek(entry.end - entry.start, os.SEEK_CUR)
                    else:
                        self._copy(entry, file)
                file.truncate()
            self.base.forget()

    def put(self, key: str, value: Tensor) -> None:
        """Write the values of one tensor into their place.

        Raises:
            CheckpointError: they are of another shape or dtype than the base's.
        """
        name = self.where[key]
        entry = self.files[name][key]
        if tuple(value.shape) != entry.shape or value.dtype != entry.dtype:
            raise CheckpointError(
                f"`{key}` would be {tuple(value.shape)} of {value.dtype}, and is {entry.shape} of "
                f"{entry.dtype} in the base. Merge in memory with merge_and_unload()."
            )
        with open(self.folder / name, "rb+") as file:
            file.seek(entry.start)
            file.write(_bytes(value))

    def end(self) -> None:
        """Write the index, where the base has one, and flush everything to the disk."""
        if self.base.index:
            metadata = {**self.base.index.get("metadata", {})}
            if "total_size" in metadata:
                metadata["total_size"] = sum(
                    e.end - e.start for entries in self.files.values() for e in entries.values()
                )
            index = {"metadata": metadata, "weight_map": dict(sorted(self.where.items()))}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for name in self.files:
            with open(self.folder / name, "rb+") as file:
                os.fsync(file.fileno())

    def _copy(self, entry: Entry, file: Any) -> None:
        held = self.base.files[self.base.where[entry.source]]
        info = held.header.tensors[entry.source]
        view = memoryview(held.bytes)
        for start in range(info.start, info.end, CHUNK):
            file.write(view[start : min(start + CHUNK, info.end)])
            held.forget()
        view.release()


def _header(entries: dict[str, Entry], metadata: Mapping[str, str]) -> bytes:
    """The bytes before the tensors; gives every entry its place in the file."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    place = 0
    for key, entry in entries.items():
        size = entry.end - entry.start
        entry.start, entry.end = place, place + size
        table[key] = {
            "dtype": CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [entry.start, entry.end],
        }
        place = entry.end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNED)
    head = len(text).to_bytes(8, "little") + text
    for entry in entries.values():
        entry.start, entry.end = entry.start + len(head), entry.end + len(head)
    return head


def _bytes(value: Tensor) -> memoryview:
    flat = value.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())
