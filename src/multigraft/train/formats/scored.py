"""Two texts and how alike they are, from -1 to 1."""

from __future__ import annotations

from multigraft.train.formats.contract import Format, Values, learnable
from multigraft.train.formats.labelled import key_of
from multigraft.train.records import Refusal, Related

SCORES = ("score", "label", "similarity_score")


def read(row: Values, line: int) -> Related:
    """One pair.

    Raises:
        Refusal: the score is no number that a cosine can reach.
    """
    first, second = learnable(row, "sentence1"), learnable(row, "sentence2")
    key = key_of(row, SCORES)
    try:
        score = float(row[key])
    except (TypeError, ValueError):
        raise Refusal(f"`{key}` (={row[key]!r}) is no number", "Give one from -1 to 1") from None
    if not -1 <= score <= 1:
        why = f"`{key}` (={score:g}) is not between -1 and 1, so that no cosine can reach it"
        raise Refusal(why, "Divide all of them by the largest that there can be")
    return Related(first, second, None, score, line)


FORMAT = Format(
    "scored",
    ("sentence1", "sentence2", "score"),
    read,
    '{"sentence1": "It rains.", "sentence2": "It pours.", "score": 0.8}',
    (Related,),
    tuple(("sentence1", "sentence2", name) for name in SCORES[1:]),
)
