"""An adapter's files as they are: its config's values and its tensors, before any model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from multigraft.atomic import recover
from multigraft.checkpoint import locate, locate_weights, read
from multigraft.config import CONFIG_NAME, PeftConfig
from multigraft.errors import CheckpointError
from multigraft.reading import PICKLE_NAME, read_config


@dataclass(frozen=True, eq=False)
class AdapterFiles:
    """One adapter on disk.

    Args:
        name: the last part of where it lies.
        weights: the file of its tensors.
        values: its config, as it stands there.
        tensors: by key relative to the base model.
        bytes: of that file.
    """

    name: str
    weights: Path
    values: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    bytes: int

    @cached_property
    def config(self) -> PeftConfig:
        """The config that the values describe.

        Raises:
            ConfigError, UnsupportedError: they describe none of ours.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PeftConfig.from_dict(self.values)

    @property
    def folder(self) -> Path:
        """Where the file lies, and the config beside it."""
        return self.weights.parent

    @property
    def is_pickle(self) -> bool:
        """Whether it was a pickle that one was allowed to read."""
        return self.weights.name == PICKLE_NAME

    @property
    def parameters(self) -> int:
        """How many numbers its file holds."""
        return sum(tensor.numel() for tensor in self.tensors.values())


def read_adapter(source: str | os.PathLike[str], *, allow_pickle: bool = False) -> AdapterFiles:
    """The adapter in a directory, or of this id on the hub.

    A directory that holds one adapter in a subfolder means that one.

    Raises:
        CheckpointError, ConfigError: there is none, or its files are damaged.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        inside = folders_in(folder)
        folder = inside[0] if len(inside) == 1 else folder
        source = folder
    values = read_config(locate(source, CONFIG_NAME))
    path = locate_weights(source)
    tensors = read(path, allow_pickle=allow_pickle)
    name = folder.resolve().name if folder.is_dir() else str(source)
    return AdapterFiles(name, path, values, tensors, path.stat().st_size)


def folders_in(folder: Path) -> list[Path]:
    """The directories that hold an adapter: this one, or else those right below it."""
    recover(folder)
    if (folder / CONFIG_NAME).is_file():
        return [folder]
    return sorted(path.parent for path in folder.glob(f"*/{CONFIG_NAME}"))


def read_adapters(sources: list[str], *, allow_pickle: bool = False) -> list[AdapterFiles]:
    """Every adapter in these places, those in subfolders of one included, each name once.

    Raises:
        CheckpointError, ConfigError: a place holds none, or files are damaged.
    """
    found: list[AdapterFiles] = []
    for source in sources:
        folder = Path(source).expanduser()
        inside: list[str | Path] = [*folders_in(folder)] if folder.is_dir() else []
        for place in inside or [source]:
            found.append(read_adapter(place, allow_pickle=allow_pickle))
    if not found:
        raise CheckpointError("no adapter was named. Give the directory of one.")
    return _named_apart(found)


def _named_apart(found: list[AdapterFiles]) -> list[AdapterFiles]:
    """With a number behind a name that another one has as well."""
    counts: dict[str, int] = {}
    named = []
    for each in found:
        counts[each.name] = number = counts.get(each.name, 0) + 1
        name = each.name if number == 1 else f"{each.name} ({number})"
        named.append(replace(each, name=name))
    return named
