"""A source as examples: read in a stream, encoded, divided, and what is bad about it told."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from multigraft.errors import ConfigError, DataError, did_you_mean
from multigraft.train.data import stream
from multigraft.train.formats import AUTO
from multigraft.train.records import BadLine, Record, Refusal, check_lines
from multigraft.train.store import Store
from multigraft.train.tasks import Task, task_of

ON_BAD_LINE = ("fail", "skip")


@dataclass(frozen=True)
class Split:
    """Which records are held out: about this share of them, by what they say.

    Each record is decided by itself, from the seed and its own content. So lines that are added,
    removed or moved change nothing for the others, and equal ones stay together.

    Raises:
        ConfigError: the share is not between 0 and 1.
    """

    share: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError(f"`eval_split` (={self.share!r}) must be between 0 and 1, as 0.1 is.")

    def holds_out(self, record: Record) -> bool:
        """Whether this record is for evaluation."""
        key = f"{self.seed}:{record.content}".encode("utf-8", "surrogatepass")
        drawn = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")
        return drawn < self.share * 2**64


@dataclass
class DataSet:
    """The examples of a source, and the records of those that are for evaluation."""

    examples: Sequence[Any]
    records: list[Record] = field(default_factory=list)


@dataclass
class Loaded:
    """What a source came to.

    Args:
        train: what to learn from.
        held_out: what the split keeps for evaluation; empty without one.
        bad: lines that are left out.
        cut: how many examples were longer than the limit.
    """

    train: DataSet
    held_out: DataSet
    bad: list[BadLine]
    cut: int


def load_data(
    source: str,
    tokenizer: Any,
    max_length: int,
    *,
    format: str = AUTO,
    on_bad_line: str = "fail",
    split: Split | None = None,
    keep_records: bool = False,
    task: str | Task = "causal-lm",
) -> Loaded:
    """Read and encode a source; neither its rows nor its examples have to fit into memory.

    Args:
        split: which records go to ``held_out``.
        keep_records: keep those of ``train`` as well, as evaluation needs them.
        task: what makes examples of records; it is settled, where it has to be.

    Raises:
        ConfigError: ``on_bad_line`` is neither ``"fail"`` nor ``"skip"``.
        DataError: lines are bad and must not be, or there are none for training or evaluation.
    """
    check_choice(on_bad_line)
    task = task_of(task)
    train, held_out = Store(task.example), Store(task.example)
    loaded = Loaded(DataSet(train), DataSet(held_out), [], 0)
    good = 0
    for found in stream(source, format, task.records):
        if isinstance(found, BadLine):
            loaded.bad.append(found)
            continue
        record = found.record
        try:
            pieces, is_cut = task.pieces(record, tokenizer, max_length)
        except Refusal as refusal:
            loaded.bad.append(refusal.at(found.file, record.line))
            continue
        good += 1
        loaded.cut += is_cut
        is_held = split is not None and split.holds_out(record)
        for piece in pieces:
            (held_out if is_held else train).append(piece)
        if is_held or keep_records:
            (loaded.held_out if is_held else loaded.train).records.append(record)
    check_lines(source, loaded.bad, good, skip_bad=on_bad_line == "skip")
    if split is not None:
        _check_split(source, split, train, held_out)
    return loaded


def records_of(sources: Iterable[str], task: Task, format: str = AUTO) -> Iterator[Record]:
    """What a task can learn from in these sources, for `Task.settled`; bad lines are passed over.

    Raises:
        DataError, MissingExtraError, UnsupportedError: as for `stream`.
    """
    for source in sources:
        for found in stream(source, format, task.records):
            if not isinstance(found, BadLine):
                yield found.record


def check_choice(on_bad_line: str) -> None:
    """Fail when this is no way to treat bad lines.

    Raises:
        ConfigError: it is not.
    """
    if on_bad_line not in ON_BAD_LINE:
        raise ConfigError(
            f"`on_bad_line` (={on_bad_line!r}) must be one of {', '.join(ON_BAD_LINE)}."
            f"{did_you_mean(str(on_bad_line), ON_BAD_LINE)}"
        )


def _check_split(source: str, split: Split, train: Sequence[Any], held_out: Sequence[Any]) -> None:
    for examples, purpose in ((train, "training"), (held_out, "evaluation")):
        if not examples:
            others = len(train) + len(held_out)
            raise DataError(
                f"{source}: with `eval_split` (={split.share:g}), none of its {others} examples is "
                f"left for {purpose}. Change the share, or give a file of its own for evaluation."
            )
