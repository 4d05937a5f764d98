"""Dropout that follows from each adapter's own seed, whoever shares its batch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from multigraft.draws import Draw, per_adapter
from multigraft.train.batches import Batch
from multigraft.train.lane import Lane


def drawing(parts: Sequence[tuple[Lane, int, Batch]]) -> AbstractContextManager[None]:
    """Let the dropout of these adapters follow from their seeds and their own rows alone.

    Args:
        parts: lane, number of the part in its step, and the part's batch.
    """
    draws = {
        lane.adapter: Draw(lane.seed(number), batch.rows, batch.width)
        for lane, number, batch in parts
    }
    return per_adapter(draws)
