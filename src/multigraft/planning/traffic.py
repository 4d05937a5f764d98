"""What ranks send each other in a step.

Counted are the bytes of each collective's whole operand: what is gathered, what is reduced. Over a
ring of n ranks each one sends (and gets) (n − 1) / n of a gather or a reduce-scatter, and twice
that of an all-reduce.
"""

from __future__ import annotations

from dataclasses import dataclass

COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce")


@dataclass(frozen=True)
class Traffic:
    """Bytes of whole operands, in one step."""

    all_gather: int = 0
    reduce_scatter: int = 0
    all_reduce: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.all_gather + other.all_gather,
            self.reduce_scatter + other.reduce_scatter,
            self.all_reduce + other.all_reduce,
        )

    def times(self, count: int) -> Traffic:
        """As often as this."""
        return Traffic(*(count * getattr(self, name) for name in COLLECTIVES))

    def sent(self, ranks: int) -> int:
        """Bytes that each of so many ranks sends."""
        whole = self.all_gather + self.reduce_scatter + 2 * self.all_reduce
        return whole * (ranks - 1) // ranks
