"""Encoded examples, however many: in memory while they are few, in a temporary file beyond that."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Sequence
from typing import IO, overload

from multigraft.train.encode import Encoded

IN_MEMORY = 64 * 2**20
"""Bytes up to which no file is used; a token takes four."""


class Store(Sequence[Encoded]):
    """A sequence of examples that can be added to; reading one does not read the others.

    A token is a 32-bit integer: its id, or ``-1 - id`` where it is not learned. Besides the tokens,
    8 bytes an example are held.
    """

    def __init__(self, in_memory: int = IN_MEMORY) -> None:
        # It lives as long as the store does, and has no name that could be left behind.
        self._file: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=in_memory)  # noqa: SIM115
        self._ends = array("q", [0])

    def append(self, example: Encoded) -> None:
        """Add one example at the end."""
        tokens = zip(example.ids, example.learned, strict=True)
        self._file.seek(4 * self._ends[-1])
        self._file.write(array("i", [i if learned else -1 - i for i, learned in tokens]).tobytes())
        self._ends.append(self._ends[-1] + len(example.ids))

    @property
    def lengths(self) -> list[int]:
        """Tokens of every example."""
        return [end - start for start, end in zip(self._ends, self._ends[1:], strict=False)]

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        start, end = self._ends[at], self._ends[at + 1]
        self._file.seek(4 * start)
        tokens = array("i")
        tokens.frombytes(self._file.read(4 * (end - start)))
        return Encoded([t if t >= 0 else -1 - t for t in tokens], [t >= 0 for t in tokens])


def lengths_of(examples: Sequence[Encoded]) -> list[int]:
    """Tokens of every example; a store is asked for them, not read."""
    if isinstance(examples, Store):
        return examples.lengths
    return [len(example.ids) for example in examples]
