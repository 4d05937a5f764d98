"""Texts that belong together, for embeddings; perhaps one that does not."""

from __future__ import annotations

from multigraft.train.formats.contract import Format, Values, learnable
from multigraft.train.records import Refusal, Related

NAMES = (("anchor", "positive"), ("query", "positive"), ("query", "answer"), ("question", "answer"))
"""Under which keys data sets have the two; the first is our own."""


def read(row: Values, line: int) -> Related:
    """One pair, or a triplet with its ``negative``.

    Raises:
        Refusal: the negative is the positive.
    """
    first, second = next((pair for pair in NAMES if all(key in row for key in pair)), NAMES[0])
    anchor, positive = learnable(row, first), learnable(row, second)
    negative = learnable(row, "negative") if row.get("negative") is not None else None
    if negative == positive:
        why = f"`negative` is equal to `{second}`"
        raise Refusal(why, "Give a text that does not belong to the anchor, or leave it out")
    return Related(anchor, positive, negative, None, line)


FORMAT = Format(
    "related",
    NAMES[0],
    read,
    '{"anchor": "Who sang?", "positive": "Ada did.", "negative": "It rained."}',
    (Related,),
    NAMES[1:],
)
