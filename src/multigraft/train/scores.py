"""Scores: how good predictions are, from 0 to 1 unless said otherwise; tensors in, floats out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def accuracy(predicted: Tensor, true: Tensor) -> float:
    """The share of entries that are equal; 0 of nothing."""
    return float((predicted == true).double().mean()) if true.numel() else 0.0


def f1(hits: float, predicted: float, true: float) -> float:
    """The harmonic mean of precision and recall; 0 where nothing is predicted and nothing true."""
    return 2 * hits / (predicted + true) if predicted + true else 0.0


def macro_f1(predicted: Tensor, true: Tensor, classes: int) -> float:
    """The mean of the F1 of each class that is predicted or true somewhere.

    Args:
        predicted, true: numbers of classes, of one shape.
    """
    own = [
        (float(((predicted == c) & (true == c)).sum()), (predicted == c).sum(), (true == c).sum())
        for c in range(classes)
    ]
    scores = [f1(hits, float(p), float(t)) for hits, p, t in own if p or t]
    return sum(scores) / len(scores) if scores else 0.0


def pearson(one: Tensor, other: Tensor) -> float:
    """Correlation, from -1 to 1; 0 where one of them does not vary."""
    a, b = one.double() - one.double().mean(), other.double() - other.double().mean()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size > 0 else 0.0


def spearman(one: Tensor, other: Tensor) -> float:
    """Correlation of ranks, from -1 to 1; equal values share their mean rank."""
    return pearson(_ranks(one), _ranks(other))


def _ranks(values: Tensor) -> Tensor:
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[place]


Entity = tuple[str, int, int]
"""Its type, its first word and the one after its last."""


def entities(tags: Sequence[str]) -> set[Entity]:
    """The entities that tags such as ``B-PER``, ``I-PER`` and ``O`` mark.

    One that begins with ``I-``, or that changes its type without ``B-``, counts as well.
    """
    found: set[Entity] = set()
    start, kind = 0, ""
    for at, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        goes_on = mark == "I" and name == kind
        if kind and not goes_on:
            found.add((kind, start, at))
        if not goes_on:
            start, kind = at, name if mark in ("B", "I") else ""
    return found


def entity_f1(rows: Iterable[tuple[Sequence[str], Sequence[str]]]) -> float:
    """The F1 of whole entities, over all rows of predicted and true tags."""
    counts: Counter[str] = Counter()
    for predicted, true in rows:
        guessed, known = entities(predicted), entities(true)
        counts += Counter(hits=len(guessed & known), guessed=len(guessed), known=len(known))
    return f1(counts["hits"], counts["guessed"], counts["known"])


def is_bio(names: Iterable[str]) -> bool:
    """Whether these are tags of entities."""
    others = [name for name in names if name != "O"]
    return bool(others) and all(name.startswith(("B-", "I-")) for name in others)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Tensors one after another; an empty one where there are none."""
    return torch.cat(list(parts)) if parts else torch.zeros(0)
