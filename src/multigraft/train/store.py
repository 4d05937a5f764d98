"""Encoded examples, however many: in memory while they are few, in a temporary file beyond that."""

from __future__ import annotations

import hashlib
import tempfile
from array import array
from collections.abc import Sequence
from typing import IO, Generic, TypeVar, overload

from multigraft.train.examples import Example

IN_MEMORY = 64 * 2**20
"""Bytes up to which no file is used; a token takes four."""

E = TypeVar("E", bound=Example)


class Store(Sequence[E], Generic[E]):
    """A sequence of examples that can be added to; reading one does not read the others.

    Besides what `Example.pack` makes of an example, 12 bytes of each are held in memory.

    Args:
        kind: of the examples, all of them.
    """

    def __init__(self, kind: type[E], in_memory: int = IN_MEMORY) -> None:
        self._kind = kind
        # It lives as long as the store does, and has no name that could be left behind.
        self._file: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=in_memory)  # noqa: SIM115
        self._ends = array("q", [0])
        self._lengths = array("i")

    def append(self, example: E) -> None:
        """Add one example at the end."""
        data = example.pack()
        self._file.seek(self._ends[-1])
        self._file.write(data)
        self._ends.append(self._ends[-1] + len(data))
        self._lengths.append(len(example))

    @property
    def lengths(self) -> list[int]:
        """Tokens of every example."""
        return self._lengths.tolist()

    def __len__(self) -> int:
        return len(self._lengths)

    @overload
    def __getitem__(self, index: int) -> E: ...
    @overload
    def __getitem__(self, index: slice) -> list[E]: ...
    def __getitem__(self, index: int | slice) -> E | list[E]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        start, end = self._ends[at], self._ends[at + 1]
        self._file.seek(start)
        return self._kind.unpack(self._file.read(end - start))


def fingerprint_of(examples: Sequence[Example]) -> str:
    """What tells these examples, in this order, from any others."""
    found = hashlib.blake2b(digest_size=16)
    for example in examples:
        packed = example.pack()
        found.update(len(packed).to_bytes(8, "little"))
        found.update(packed)
    return found.hexdigest()


def lengths_of(examples: Sequence[Example]) -> list[int]:
    """Tokens of every example; a store is asked for them, not read."""
    if isinstance(examples, Store):
        return examples.lengths
    return [len(example) for example in examples]
