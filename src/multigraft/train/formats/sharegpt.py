"""ShareGPT: ``conversations`` of ``from`` (human, gpt) and ``value``, perhaps a ``system`` text."""

from __future__ import annotations

from multigraft.train.formats._turns import turns
from multigraft.train.formats.contract import Format, Values, nested, optional_text
from multigraft.train.records import Chat


def read(row: Values, line: int) -> Chat:
    """One conversation; the row's own system text goes first."""
    said, system = nested(row["conversations"]), optional_text(row, "system")
    if system.strip() and isinstance(said, list):
        said = [{"from": "system", "value": system}, *said]
    return Chat(turns(said, "conversations"), line)


FORMAT = Format(
    "sharegpt",
    ("conversations",),
    read,
    '{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}',
)
