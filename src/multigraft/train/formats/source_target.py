"""Source and target: what an encoder reads, and what a decoder should write."""

from __future__ import annotations

from multigraft.train.formats.contract import Format, Values, learnable, text_of
from multigraft.train.records import Pair

NAMES = (
    ("source", "target"),
    ("document", "summary"),
    ("dialogue", "summary"),
    ("article", "highlights"),
)
"""Under which keys data sets have the two; the first is our own."""


def read(row: Values, line: int) -> Pair:
    """One pair."""
    source, target = next((pair for pair in NAMES if all(key in row for key in pair)), NAMES[0])
    return Pair(text_of(row, source), learnable(row, target), line)


FORMAT = Format(
    "source-target",
    NAMES[0],
    read,
    '{"source": "Guten Morgen", "target": "Good morning"}',
    (Pair,),
    NAMES[1:],
)
