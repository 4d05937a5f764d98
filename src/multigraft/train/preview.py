"""What training will see: each token's text, whether it is learned, and what is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from multigraft.train.data import stream
from multigraft.train.encode import Encoded, Span, pieces_of
from multigraft.train.formats import AUTO
from multigraft.train.records import BadLine, Refusal, check_lines


@dataclass(frozen=True)
class Shown:
    """An example as it will be seen.

    Args:
        spans: its text, cut where learning begins and ends; special tokens by name.
        tokens: how many it has.
        learned: how many of them are learned.
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
        learned: learned tokens of all of them.
        cut: how many were longer than the limit.
        bad: lines that cannot be used.
        kinds: how many records there are of each kind.
    """

    source: str
    shown: list[Shown] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    learned: int = 0
    cut: int = 0
    bad: list[BadLine] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)


def preview(
    source: str, tokenizer: Any, *, max_length: int = 1024, format: str = AUTO, limit: int = 3
) -> Preview:
    """Read and encode a source as training does, and keep the first ``limit`` examples.

    Raises:
        DataError: there is no such source, or nothing in it at all.
        MissingExtraError, UnsupportedError: as for `stream`.
    """
    seen = Preview(source)
    for found in stream(source, format):
        if isinstance(found, BadLine):
            seen.bad.append(found)
            continue
        try:
            pieces, is_cut = pieces_of(found.record, tokenizer, max_length)
        except Refusal as refusal:
            seen.bad.append(refusal.at(found.file, found.record.line))
            continue
        seen.cut += is_cut
        kind = type(found.record).__name__.lower()
        seen.kinds[kind] = seen.kinds.get(kind, 0) + 1
        for piece in pieces:
            seen.lengths.append(len(piece.ids))
            learned = sum(piece.learned[1:])
            seen.learned += learned
            if len(seen.shown) < limit:
                spans = tuple(spans_of(piece, tokenizer))
                place = (found.file, found.record.line)
                seen.shown.append(Shown(*place, spans, len(piece.ids), learned))
    if not seen.bad:
        check_lines(source, seen.bad, len(seen.lengths), skip_bad=True)
    return seen


def spans_of(example: Encoded, tokenizer: Any) -> list[Span]:
    """The text of an example's tokens, cut where learning begins and ends.

    The first token is never predicted, so it is not learned whatever its flag says.
    """
    flags = [False, *example.learned[1:]]
    ends = [at for at in range(1, len(flags)) if flags[at] != flags[at - 1]] + [len(flags)]
    spans, start, before = [], 0, ""
    for end in ends:
        upto = _decoded(example.ids[:end], tokenizer)
        # From a prefix to a prefix, since decoders drop the space in front of a text's first word.
        is_longer = upto.startswith(before)
        text = upto[len(before) :] if is_longer else _decoded(example.ids[start:end], tokenizer)
        spans.append(Span(text, flags[start]))
        start, before = end, upto
    return spans


def _decoded(ids: Sequence[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
