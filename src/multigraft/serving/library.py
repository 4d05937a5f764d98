"""Rows of a batch by adapters' names, of which a few are in slots and any number is known.

    library = AdapterLibrary(model, slots=8, rank=16)
    library.add_folder("adapters")                          # a thousand of them
    with library.serving(["dates", "names", "__base__"]) as rows:
        library.model(**batch, adapter_names=rows)

A slot is an adapter of the model that waits for values (`multigraft.slots`): putting another one in
writes tensors and nothing else, so that nothing is compiled or captured anew.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from multigraft.config import CONFIG_NAME
from multigraft.containers import check_name
from multigraft.errors import AdapterNameError, ConfigError, RoutingError, did_you_mean
from multigraft.hotswap import hotswap_adapter_from_state_dict
from multigraft.methods.lora import LoraConfig
from multigraft.model import PeftModel
from multigraft.routing import BASE
from multigraft.serving.shelf import Disk, Shelf, Source
from multigraft.slots import into_slot
from multigraft.state import roster_of_model

MEMORY = 1 << 30
"""Bytes of the CPU's memory for adapters that are in no slot."""
SLOT = "slot-{}"


@dataclass
class Counts:
    """What a library has done so far.

    Args:
        asked: adapters that batches named, each once a batch.
        found: of them, those that were in a slot already.
        swapped: those that were put into one.
        read: those whose files were read.
    """

    asked: int = 0
    found: int = 0
    swapped: int = 0
    read: int = 0


class AdapterLibrary:
    """Any number of LoRA adapters, served through a few slots of one model.

    Args:
        model: a base model, or a `PeftModel`, whose own adapters stay as they are; calls go to
            ``library.model``.
        slots: how many adapters a batch may name.
        rank: the largest rank that is served.
        target_modules: where the slots are; an adapter may act at fewer modules, not at others.
        memory: bytes of the CPU's memory for adapters that are in no slot.
        disk: a folder for copies of files from slow storage or the hub; None reads them in place.
        disk_bytes: what the copies may take.

    Raises:
        ConfigError: a number is not positive.
        AdapterNameError: the model has adapters called ``slot-0``, … already.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        slots: int = 8,
        rank: int = 16,
        target_modules: str | Sequence[str] = "all-linear",
        memory: int = MEMORY,
        disk: str | os.PathLike[str] | None = None,
        disk_bytes: int = 16 << 30,
    ) -> None:
        for name, value in (("slots", slots), ("rank", rank)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"`{name}` (={value!r}) must be a number of at least 1.")
        self.model = model if isinstance(model, PeftModel) else PeftModel(model, None)
        self.rank = rank
        self.sources: dict[str, Source] = {}
        self.counts = Counts()
        self._shelf = Shelf(memory, None if disk is None else Disk(disk, disk_bytes))
        self._slots = [SLOT.format(n) for n in range(slots)]
        self._held: OrderedDict[str, str] = OrderedDict()
        """Adapters in slots, the least recently used first."""
        self._busy: dict[str, int] = {}
        """How many batches are using an adapter now."""
        self._lock = threading.RLock()
        self._make_slots(target_modules)

    def add(self, name: str, source: str | os.PathLike[str], **options: Any) -> None:
        """Know an adapter by this name; nothing is read before it is asked for.

        Args:
            source: a directory, or an id on the hub.
            options: of the hub: ``revision``, ``subfolder``, ``token``, …

        Raises:
            AdapterNameError: the name is taken, or cannot be one.
        """
        if check_name(name) in self.sources or name == BASE:
            raise AdapterNameError(
                f"`{name}` is known already. Choose another name, or remove() it first."
            )
        self.sources[name] = Source(os.fspath(source), options)

    def add_folder(self, folder: str | os.PathLike[str]) -> list[str]:
        """Know every adapter that lies in a subfolder, by the subfolder's name; the names.

        Raises:
            AdapterNameError: one is known already; none was added.
        """
        found = sorted(path.parent for path in Path(folder).glob(f"*/{CONFIG_NAME}"))
        taken = [path.name for path in found if path.name in self.sources]
        if taken:
            raise AdapterNameError(f"`{taken[0]}` is known already. remove() it first.")
        for path in found:
            self.add(path.name, path)
        return [path.name for path in found]

    def remove(self, name: str) -> None:
        """Forget an adapter; its slot is free for another one.

        Raises:
            AdapterNameError: it is unknown.
            RoutingError: a batch is using it.
        """
        with self._lock:
            self._require(name)
            if self._busy.get(name):
                raise RoutingError(f"`{name}` is in use. Leave its serving() block first.")
            del self.sources[name]
            self._shelf.forget(name)
            slot = self._held.pop(name, None)
            if slot is not None:
                self._slots.append(slot)

    @contextmanager
    def serving(self, names: Sequence[str]) -> Iterator[list[str]]:
        """The rows' adapters in slots, for the length of the block.

        Args:
            names: one a row, ``"__base__"`` for none.

        Yields:
            What ``adapter_names`` takes.

        Raises:
            AdapterNameError: one is unknown.
            RoutingError: more are named, or in use elsewhere, than there are slots.
            CheckpointError: files are damaged, or act where the slots do not; nothing was changed.
        """
        wanted = [name for name in dict.fromkeys(names) if name != BASE]
        with self._lock:
            for name in wanted:
                self._require(name)
            self._check_room(wanted)
            for name in wanted:  # none of them may make room for another
                self._busy[name] = self._busy.get(name, 0) + 1
            try:
                rows = {name: self._slot_of(name) for name in wanted}
            except BaseException:
                self._release(wanted)
                raise
        try:
            yield [rows.get(name, BASE) for name in names]
        finally:
            with self._lock:
                self._release(wanted)

    @property
    def in_slots(self) -> list[str]:
        """Adapters that are in a slot now, the least recently used first."""
        return list(self._held)

    @property
    def in_memory(self) -> int:
        """Bytes of the CPU's memory that adapters in no slot take."""
        return self._shelf.nbytes

    def __len__(self) -> int:
        return len(self.sources)

    def _slot_of(self, name: str) -> str:
        self.counts.asked += 1
        if name in self._held:
            self.counts.found += 1
            self._held.move_to_end(name)
            return self._held[name]
        reads = self._shelf.reads
        held = self._shelf.get(name, self.sources[name])
        self.counts.read += self._shelf.reads - reads
        slot = self._free_slot()
        try:
            hotswap_adapter_from_state_dict(self.model, held.tensors, slot, held.config)
        except BaseException:
            self._slots.append(slot)
            raise
        self.counts.swapped += 1
        self._held[name] = slot
        return slot

    def _free_slot(self) -> str:
        if self._slots:
            return self._slots.pop()
        name = next(name for name in self._held if not self._busy.get(name))
        return self._held.pop(name)

    def _check_room(self, wanted: Sequence[str]) -> None:
        needed = {*wanted, *self._busy}
        room = len(self._slots) + len(self._held)
        if len(needed) > room:
            raise RoutingError(
                f"a batch names {len(wanted)} adapters, and {len(needed)} would be in use at once; "
                f"there are {room} slots. Split the batch, or give the library more `slots`."
            )

    def _release(self, names: Sequence[str]) -> None:
        for name in names:
            self._busy[name] -= 1
            if not self._busy[name]:
                del self._busy[name]

    def _require(self, name: str) -> None:
        if name not in self.sources:
            hint = did_you_mean(str(name), self.sources)
            raise AdapterNameError(
                f"the library has no adapter called `{name}`.{hint} It knows {len(self.sources)}; "
                "add() it first."
            )

    def _make_slots(self, target_modules: str | Sequence[str]) -> None:
        named = target_modules if isinstance(target_modules, str) else list(target_modules)
        config = LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=named)
        roster, _ = roster_of_model(self.model)
        for slot in self._slots:
            self.model.add_adapter(slot, config)
            for layer, graft in list(roster.grafts(slot)):
                into_slot(layer, graft, self.rank, is_fixed=True)
