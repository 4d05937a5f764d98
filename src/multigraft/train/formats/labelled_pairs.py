"""Two texts and a label of the pair: does one follow from the other, do they say the same."""

from __future__ import annotations

from multigraft.train.formats.contract import Format, Values, learnable
from multigraft.train.formats.labelled import LABELS, label_of
from multigraft.train.records import Labelled

PAIRS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
)
"""Under which keys data sets have the two; the first is our own."""


def read(row: Values, line: int) -> Labelled:
    """One pair."""
    first, second = next((pair for pair in PAIRS if all(key in row for key in pair)), PAIRS[0])
    return Labelled(learnable(row, first), label_of(row), learnable(row, second), line)


FORMAT = Format(
    "labelled-pair",
    ("text", "text_pair", "label"),
    read,
    '{"text": "It rains.", "text_pair": "It is wet.", "label": "entailment"}',
    (Labelled,),
    tuple((*pair, name) for pair in PAIRS for name in LABELS),
)
