"""What formats and consumers share: an adapter as low-rank pairs, and the two contracts.

    ΔW = alpha / rank · B A         A: (rank, in, …)   B: (out, rank, …)

A format is a way to write such pairs into files; a consumer is a program with rules on what it
reads. One file each, registered by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from multigraft.registry import Registry

Files = dict[Path, Callable[[Path], None]]
"""Targets to what fills them, as `multigraft.atomic.write_files` takes them."""
MERGE_FIRST = (
    "Merge first: model.merge_and_unload().save_pretrained(DIR), and use what that writes."
)


@dataclass(frozen=True, eq=False)
class Pair:
    """A low-rank update of one layer.

    Args:
        A: ``(rank, in, …)``; of an embedding ``(rank, tokens)``.
        B: ``(out, rank, …)``.
        alpha: the update is scaled by ``alpha / rank``.
        magnitude: DoRA's, ``(out,)``.
        is_lookup: whether the layer is an embedding.
    """

    A: Tensor
    B: Tensor
    alpha: float
    magnitude: Tensor | None = None
    is_lookup: bool = False

    @property
    def rank(self) -> int:
        """How many rows A has."""
        return int(self.A.shape[0])

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank


@dataclass(eq=False)
class Loras:
    """What a LoRA file holds: pairs by base path, of one model or of several.

    Args:
        parts: names of models (``unet``, ``text_encoder``; empty where there is but one) to pairs
            by the path of their layer.
        values: by part, what is known of its config beyond ranks and scales.
        notes: what the reader of the result should know.
    """

    parts: dict[str, dict[str, Pair]]
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Options:
    """What the user adds to the files.

    Args:
        part: the model that files of one model belong to.
        base: a directory, or an id on the hub, with the base model's ``config.json``.
        allow_pickle: read ``.bin`` files as well.
    """

    part: str | None = None
    base: str | None = None
    allow_pickle: bool = False


class Format(ABC):
    """One way to write pairs into files.

    Args:
        name: as the command line has it.
        is_folder: whether it is a folder rather than one file.
    """

    name: ClassVar[str]
    is_folder: ClassVar[bool] = False

    @abstractmethod
    def recognises(self, source: Path, names: Collection[str]) -> bool:
        """Whether a folder, or a file with tensors of these names, is of this format."""

    @abstractmethod
    def read(self, source: Path, options: Options) -> Loras:
        """Every tensor of the files; what cannot be expressed as pairs is refused."""

    @abstractmethod
    def write(self, loras: Loras, target: Path, options: Options) -> Files:
        """The files that hold these pairs; nothing is written yet."""


@dataclass(eq=False)
class Adapter:
    """A PEFT adapter that is nothing but pairs, on its way to a consumer.

    Args:
        source: its folder.
        values: of its config.
        pairs: by base path.
        rest: tensors that are no pair's, by their key relative to the base model.
    """

    source: Path
    values: Mapping[str, Any]
    pairs: dict[str, Pair]
    rest: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Outcome:
    """What an export or a conversion did; prints as text.

    Args:
        target: where the files lie.
        files: their names there.
        done: what was rewritten, in order.
        notes: what to mind when they are used.
    """

    target: str
    files: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "target": self.target,
            "files": self.files,
            "done": self.done,
            "notes": self.notes,
        }

    def __str__(self) -> str:
        lines = [f"done: {each}" for each in self.done]
        lines += [f"note: {each}" for each in self.notes]
        return "\n".join([*lines, f"written to {self.target}: {', '.join(self.files)}"])


class Consumer(ABC):
    """A program that reads adapters, and its rules.

    Args:
        name: as the command line has it.
        title: as it writes itself.
    """

    name: ClassVar[str]
    title: ClassVar[str]

    @abstractmethod
    def prepare(self, adapter: Adapter, target: Path, options: Options, outcome: Outcome) -> Files:
        """The files that this program reads without dropping anything.

        Raises:
            UnsupportedError: there are none; nothing was written.
        """


FORMATS: Registry[Format] = Registry("format")
CONSUMERS: Registry[Consumer] = Registry("consumer")
