"""Plain text, all of which is learned."""

from __future__ import annotations

from multigraft.train.formats.contract import Format, Values, learnable
from multigraft.train.records import Text


def read(row: Values, line: int) -> Text:
    """One text."""
    return Text(learnable(row, "text"), line)


FORMAT = Format("text", ("text",), read, '{"text": "Once upon a time …"}')
