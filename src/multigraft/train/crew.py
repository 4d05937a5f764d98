"""Who makes a run: this process alone, or several that each take a share of every batch.

    rows 0 … 7 of an adapter's batch ──> rank 0: rows 0 … 3, rank 1: rows 4 … 7
    losses and gradients             ──> summed over the ranks, each divided by the whole count

So however many ranks there are, every adapter makes the steps that it would make on one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from multigraft.distributed import Ranks, Replicas, TensorParallel
    from multigraft.train.lane import Lane


class Crew:
    """One process alone: it takes everything, and there is nobody to agree with."""

    rank = 0
    size = 1
    """Among how many processes rows are shared out."""
    is_parted = False
    """Whether adapters lie in parts on several processes."""

    @property
    def is_main(self) -> bool:
        """Whether this process reports and writes."""
        return self.rank == 0

    def share(self, rows: Sequence[int]) -> tuple[Sequence[int], int]:
        """Which of these rows this process takes, and the place of the first of them.

        With fewer rows than processes some take the last one, of which they learn nothing: all
        have to run the model, since its parts may lie on all of them.
        """
        each, more = divmod(len(rows), self.size)
        first = self.rank * each + min(self.rank, more)
        own = rows[first : first + each + (self.rank < more)]
        return (own, first) if own else (rows[-1:], len(rows) - 1)

    def takes(self, rows: int) -> bool:
        """Whether any of so many rows are this process's to learn from."""
        return rows > self.rank

    def sums(self, values: Tensor) -> list[float]:
        """The sums of these numbers over all processes."""
        found: list[float] = values.tolist()
        return found

    def reduce(self, lanes: Iterable[Lane]) -> None:
        """Make every gradient of these lanes the sum over all processes."""

    def agreed(self, value: Any) -> Any:
        """The first process's value, on all."""
        return value


class Several(Crew):
    """One of several processes."""

    def agreed(self, value: Any) -> Any:
        """Broadcast from the first one."""
        held = [value]
        torch.distributed.broadcast_object_list(held, src=0)
        return held[0]


class Ranked(Several):
    """One of several processes that each have rows of their own.

    Args:
        ranks: this one, and how many there are.
        replicas: the adapters, whole on each of them.
    """

    def __init__(self, ranks: Ranks, replicas: Replicas) -> None:
        self.rank, self.size = ranks.rank, ranks.size
        self._replicas = replicas

    def sums(self, values: Tensor) -> list[float]:
        """One collective for all of them."""
        whole = values.detach().double()
        self._replicas.sum([whole])
        found: list[float] = whole.tolist()
        return found

    def reduce(self, lanes: Iterable[Lane]) -> None:
        """Every lane's gradients, in a few large collectives."""
        trained = [p for lane in lanes for p in lane.parameters]
        self._replicas.reduce(1.0, trained)


class Parted(Several):
    """One of several processes that hold parts of every layer, and all see all rows.

    Args:
        ranks: this one, and how many there are.
        parallel: the model's layers and adapters in parts.
    """

    is_parted = True

    def __init__(self, ranks: Ranks, parallel: TensorParallel) -> None:
        self._is_main = ranks.is_main
        self._parallel = parallel

    @property
    def is_main(self) -> bool:
        return self._is_main

    def sums(self, values: Tensor) -> list[float]:
        """The first one's, so that all decide alike."""
        found: list[float] = self.agreed(values.tolist())
        return found

    def reduce(self, lanes: Iterable[Lane]) -> None:
        """What each process has of the gradients of whole factors is added up."""
        self._parallel.reduce()


ALONE = Crew()
