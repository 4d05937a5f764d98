"""Prompt and completion: two texts, used as they stand; the completion is learned."""

from __future__ import annotations

from multigraft.train.formats.contract import Format, Values, learnable, text_of
from multigraft.train.records import Pair


def read(row: Values, line: int) -> Pair:
    """One pair."""
    prompt = text_of(row, "prompt")
    return Pair(prompt, learnable(row, "completion"), line)


FORMAT = Format(
    "prompt-completion",
    ("prompt", "completion"),
    read,
    '{"prompt": "the first of May, 1999", "completion": "1999-05-01"}',
)
