"""Weights in safetensors files, mapped into memory: a page is read when it is used, and let go.

weights = MappedWeights(folder)
weights["model.layers.0.mlp.up_proj.weight"]     a tensor whose bytes are the file's
weights.forget()                                 their pages leave memory; they can come again
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multigraft.errors import CheckpointError
from multigraft.reading import CONFIG_BYTES, Header, TensorInfo, check_inside, read_header

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
INDEX_BYTES = CONFIG_BYTES * 16
DROP = getattr(mmap, "MADV_DONTNEED", None)
"""How the system is told that pages are not needed, where it can be."""


class MappedFile:
    """One safetensors file.

    Raises:
        CheckpointError: it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: Header = read_header(path)
        with open(path, "rb") as file:
            # Copied on writing: whatever a model does to its weights, the file stays as it is.
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def tensor(self, name: str) -> Tensor:
        """A tensor of the file; only what is read of it takes memory."""
        info = self.header.tensors[name]
        count = math.prod(info.shape)
        if not count:
            return torch.empty(info.shape, dtype=info.dtype)
        return torch.frombuffer(
            self.bytes, dtype=info.dtype, count=count, offset=info.start
        ).reshape(info.shape)

    def forget(self) -> None:
        """Let the pages go that were read; the next use reads them again."""
        if DROP is not None:
            self.bytes.madvise(DROP)


class MappedWeights(Mapping[str, Tensor]):
    """Every tensor of a folder that `save_pretrained` wrote, in one file or in several.

    Raises:
        CheckpointError: it holds no safetensors, or they are damaged or incomplete.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = _index(folder)
        names = dict.fromkeys(self.index["weight_map"].values()) if self.index else {WEIGHTS: None}
        self.files = {name: _opened(folder, name) for name in names}
        self.where = {key: file for file, each in self.files.items() for key in each.header.tensors}
        lacking = [key for key in (self.index or {}).get("weight_map", {}) if key not in self.where]
        if lacking:
            raise CheckpointError(
                f"{folder / INDEX} names {len(lacking)} tensors that its files lack "
                f"({lacking[0]}, …). Copy or download the model again."
            )

    def __getitem__(self, key: str) -> Tensor:
        return self.files[self.where[key]].tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def __len__(self) -> int:
        return len(self.where)

    def info(self, key: str) -> TensorInfo:
        """Dtype, shape and place of a tensor."""
        return self.files[self.where[key]].header.tensors[key]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(self.info(key).end - self.info(key).start for key in self)

    def forget(self) -> None:
        """Let go of every page that was read."""
        for file in self.files.values():
            file.forget()


def _opened(folder: Path, name: str) -> MappedFile:
    path = folder / name
    if Path(name).name != name or not path.is_file():
        pickles = sorted(p.name for p in folder.glob("*.bin"))
        what = f"{', '.join(pickles)} are pickles" if pickles else f"there is no {name}"
        raise CheckpointError(
            f"{folder}: its weights are read from safetensors, and {what}. Save the model anew "
            "with save_pretrained(), or name another copy of it."
        )
    check_inside(path, folder)
    return MappedFile(path)


def _index(folder: Path) -> dict[str, Any]:
    """The list of which tensor lies in which file; empty where one file holds all."""
    path = folder / INDEX
    if not path.is_file():
        return {}
    check_inside(path, folder)
    try:
        if path.stat().st_size > INDEX_BYTES:
            raise ValueError(f"more than {INDEX_BYTES:,} bytes")
        values = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(name, str) for name in values["weight_map"].values()):
            raise ValueError("`weight_map` must name files")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}). Download the model again.") from error
    found: dict[str, Any] = values
    return found
