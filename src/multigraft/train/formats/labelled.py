"""A text and its label: a class, several classes, or a value."""

from __future__ import annotations

import math
from typing import Any

from multigraft.train.formats.contract import Format, Values, kind, learnable, nested
from multigraft.train.records import Label, Labelled, Refusal

TEXTS = ("text", "sentence", "content")
LABELS = ("label", "labels")


def read(row: Values, line: int) -> Labelled:
    """One text."""
    return Labelled(learnable(row, key_of(row, TEXTS)), label_of(row), None, line)


def key_of(row: Values, names: tuple[str, ...]) -> str:
    """The first of these keys that the row has."""
    return next((name for name in names if name in row), names[0])


def label_of(row: Values) -> Label | tuple[Label, ...]:
    """The label of a row, several of them where it gives a list.

    Raises:
        Refusal: it is neither a name nor a number.
    """
    key = key_of(row, LABELS)
    found = nested(row[key])
    if isinstance(found, list | tuple):
        return tuple(label(each, f"an entry of `{key}`") for each in found)
    return label(found, f"`{key}`")


def label(value: Any, where: str) -> Label:
    """A class's name or number, or a value; truth values become names.

    Args:
        where: it stood, for messages.

    Raises:
        Refusal: it is none of these.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, int | float) and math.isfinite(value):
        return value
    shown = "empty" if isinstance(value, str) else kind(value)
    if isinstance(value, float):
        shown = str(value)
    raise Refusal(f"{where} is {shown}", "Give a class by its name or number, or a finite value")


FORMAT = Format(
    "labelled",
    ("text", "label"),
    read,
    '{"text": "What a film!", "label": "positive"}',
    (Labelled,),
    tuple((text, name) for text in TEXTS for name in LABELS),
)
