"""Conversations as chat services write them: ``messages`` of ``role`` and ``content``."""

from __future__ import annotations

from multigraft.train.formats._turns import turns
from multigraft.train.formats.contract import Format, Values, nested
from multigraft.train.records import Chat


def read(row: Values, line: int) -> Chat:
    """One conversation."""
    return Chat(turns(nested(row["messages"]), "messages"), line)


FORMAT = Format(
    "messages",
    ("messages",),
    read,
    '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}',
)
