"""Where adapters wait that are in no slot: on disk and in memory, the least used first out."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multigraft import checkpoint
from multigraft.atomic import place_folder
from multigraft.config import PeftConfig
from multigraft.errors import CheckpointError, ConfigError
from multigraft.loading import HUB_OPTIONS, read_config


@dataclass(frozen=True)
class Source:
    """Where an adapter's files are.

    Args:
        place: a directory, or an id on the hub.
        options: ``revision``, ``subfolder``, ``token``, … for the hub.
    """

    place: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_local(self) -> bool:
        """Whether it is a directory."""
        return Path(self.place).is_dir()


@dataclass(frozen=True)
class Held:
    """An adapter in memory."""

    config: PeftConfig
    tensors: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        """What its tensors take."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


class Disk:
    """A folder of copies, for adapters that come from slow storage or from the hub.

    What was used longest ago is removed when there is too much, also by later processes: the time
    of use is that of the folder.

    Args:
        folder: made when it is missing; nothing else should lie there.
        most: bytes that the copies may take.

    Raises:
        ConfigError: ``most`` is not positive.
    """

    def __init__(self, folder: str | os.PathLike[str], most: int) -> None:
        if most <= 0:
            raise ConfigError(f"`disk_bytes` (={most}) must be a positive number of bytes.")
        self.folder, self.most = Path(folder), most

    def path(self, source: Source) -> Path:
        """The local copy of an adapter's files, made unless it is there.

        Raises:
            CheckpointError: the source holds no adapter, or the disk refuses.
        """
        key = repr(
            (
                os.path.abspath(source.place) if source.is_local else source.place,
                *sorted(
                    (name, str(value)) for name, value in source.options.items() if name != "token"
                ),
            )
        )
        place = self.folder / hashlib.sha256(key.encode()).hexdigest()[:32]
        if not place.is_dir():
            place_folder(place, lambda folder: _copy(source, folder))
            self._make_room(place)
        os.utime(place)
        return place

    def nbytes(self) -> int:
        """What the copies take."""
        return sum(_size(place) for place in self._copies())

    def _make_room(self, kept: Path) -> None:
        copies = sorted(self._copies(), key=lambda place: place.stat().st_mtime)
        total = sum(map(_size, copies))
        for place in copies:
            if total <= self.most:
                return
            if place != kept:
                total -= _size(place)
                shutil.rmtree(place, ignore_errors=True)

    def _copies(self) -> list[Path]:
        return [p for p in self.folder.iterdir() if p.is_dir() and not p.name.startswith(".")]


class Shelf:
    """Adapters in the CPU's memory, pinned where an accelerator can copy from that.

    Args:
        most: bytes that they may take; one that is larger by itself is not kept.
        disk: where copies of the files go first; None reads them where they are.

    Raises:
        ConfigError: ``most`` is not positive.
    """

    def __init__(self, most: int, disk: Disk | None = None) -> None:
        if most <= 0:
            raise ConfigError(f"`memory` (={most}) must be a positive number of bytes.")
        self.most, self.disk = most, disk
        self._held: OrderedDict[str, Held] = OrderedDict()
        self.nbytes = 0
        self.reads = 0
        """How often files were read."""

    def get(self, name: str, source: Source) -> Held:
        """An adapter's config and tensors.

        Raises:
            CheckpointError: its files are missing or damaged.
        """
        held = self._held.get(name)
        if held is None:
            held = self._read(source, name)
            self.reads += 1
            self._keep(name, held)
        else:
            self._held.move_to_end(name)
        return held

    def forget(self, name: str) -> None:
        """Let go of what is held of an adapter, if anything is."""
        held = self._held.pop(name, None)
        self.nbytes -= held.nbytes if held is not None else 0

    def __contains__(self, name: object) -> bool:
        return name in self._held

    def __len__(self) -> int:
        return len(self._held)

    def _keep(self, name: str, held: Held) -> None:
        if held.nbytes > self.most:
            return
        self._held[name] = held
        self.nbytes += held.nbytes
        while self.nbytes > self.most:
            _, gone = self._held.popitem(last=False)
            self.nbytes -= gone.nbytes

    def _read(self, source: Source, name: str) -> Held:
        if self.disk is not None:
            source = Source(str(self.disk.path(source)))
        config, options = read_config(source.place, name, dict(source.options))
        where = {k: v for k, v in options.items() if k in (*HUB_OPTIONS, "subfolder")}
        tensors = checkpoint.read(checkpoint.locate_weights(source.place, **where))
        if torch.accelerator.is_available():
            tensors = {key: tensor.pin_memory() for key, tensor in tensors.items()}
        return Held(config, tensors)


def _copy(source: Source, folder: Path) -> None:
    config, options = read_config(source.place, "adapter", dict(source.options))
    where = {k: v for k, v in options.items() if k in (*HUB_OPTIONS, "subfolder")}
    weights = checkpoint.locate_weights(source.place, **where)
    if weights.suffix != ".safetensors":
        raise CheckpointError(
            f"{source.place} holds no adapter_model.safetensors. Load it and save it again, with "
            "allow_pickle=True if it is an old file that you trust."
        )
    config.save_pretrained(folder)
    shutil.copyfile(weights, folder / "adapter_model.safetensors")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
