"""Dropout that follows from each adapter's own seed, whoever shares its batch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from multigraft.draws import Draw, per_adapter
from multigraft.train.lane import Part


def drawing(parts: Sequence[Part]) -> AbstractContextManager[None]:
    """Let the dropout of these adapters follow from their seeds and their own rows alone."""
    return per_adapter(
        {
            part.lane.adapter: Draw(
                part.lane.seed(part.number), part.batch.rows, part.batch.width, part.first
            )
            for part in parts
        }
    )
