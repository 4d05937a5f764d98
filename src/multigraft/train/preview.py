"""What training will see: each token's text, whether it is learned, and what is left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from multigraft.train.data import stream
from multigraft.train.dataset import records_of
from multigraft.train.encode import Span
from multigraft.train.formats import AUTO
from multigraft.train.records import BadLine, Refusal, check_lines
from multigraft.train.tasks import Task, described, task_of


@dataclass(frozen=True)
class Shown:
    """An example as it will be seen.

    Args:
        spans: its text, cut where learning begins and ends; special tokens by name.
        tokens: how many it has.
        learned: how many of them are learned; for tasks with labels or pairs, of those.
    """

    file: str
    line: int
    spans: tuple[Span, ...]
    tokens: int
    learned: int


@dataclass
class Preview:
    """The first examples of a source, and what all of it comes to.

    Args:
        shown: the first examples.
        lengths: tokens of every example.
        learned: what is learned of all of them, in the unit.
        cut: how many were longer than the limit.
        bad: lines that cannot be used.
        kinds: how many records there are of each kind.
        task: what is learned, with its options and the labels that were found.
        unit: what ``learned`` counts: tokens, labels, tags, values or pairs.
    """

    source: str
    shown: list[Shown] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    learned: int = 0
    cut: int = 0
    bad: list[BadLine] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)
    task: Mapping[str, Any] = field(default_factory=dict)
    unit: str = "tokens"


def preview(
    source: str,
    tokenizer: Any,
    *,
    max_length: int = 1024,
    format: str = AUTO,
    limit: int = 3,
    task: str | Mapping[str, Any] | Task = "causal-lm",
) -> Preview:
    """Read and encode a source as training does, and keep the first ``limit`` examples.

    Args:
        task: what is to be learned: its name, or a mapping of ``name`` and options.

    Raises:
        DataError: there is no such source, or nothing in it at all.
        MissingExtraError, UnsupportedError: as for `stream`.
    """
    chosen = task_of(task)
    chosen = chosen.settled(records_of([source], chosen, format))
    seen = Preview(source, task=described(chosen), unit=chosen.unit)
    for found in stream(source, format, chosen.records):
        if isinstance(found, BadLine):
            seen.bad.append(found)
            continue
        try:
            pieces, is_cut = chosen.pieces(found.record, tokenizer, max_length)
        except Refusal as refusal:
            seen.bad.append(refusal.at(found.file, found.record.line))
            continue
        seen.cut += is_cut
        kind = type(found.record).__name__.lower()
        seen.kinds[kind] = seen.kinds.get(kind, 0) + 1
        for piece in pieces:
            seen.lengths.append(len(piece))
            learned = chosen.learned(piece)
            seen.learned += learned
            if len(seen.shown) < limit:
                spans = tuple(chosen.spans(piece, tokenizer))
                place = (found.file, found.record.line)
                seen.shown.append(Shown(*place, spans, len(piece), learned))
    if not seen.bad:
        check_lines(source, seen.bad, len(seen.lengths), skip_bad=True)
    return seen
