"""What `torch.nn.parallel.DistributedDataParallel` is told, and what its users must be told.

It averages the gradients of what was trainable when it was made, and of nothing else: an adapter
that begins to train later would be another one on every rank, without a word.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

from multigraft.errors import MultigraftWarning

if TYPE_CHECKING:
    from multigraft.roster import Roster


class WrappedFacade:
    """Mixed into the model's handle."""

    if TYPE_CHECKING:

        @property
        def roster(self) -> Roster:
            """Which adapters there are and who is active."""

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Nothing; but who asks is being made around this model, and takes note of what trains."""
        self.roster.averaged = frozenset(n for n in self.roster.configs if self.roster.trains(n))
        return []


def warn_of_unaveraged(averaged: frozenset[str], names: Iterable[str]) -> None:
    """Say so when adapters begin to train that a wrapper around the model knows nothing of.

    Args:
        averaged: those that it knows.
    """
    late = [name for name in names if name not in averaged]
    if late:
        warnings.warn(
            f"adapters {late} begin to train in a model that DistributedDataParallel was made "
            f"around while {sorted(averaged)} trained: their gradients are not averaged, and every "
            "rank would train another adapter. Make it anew around the model, or use "
            "multigraft.distributed.Replicas, which lets adapters change between steps.",
            MultigraftWarning,
            stacklevel=5,
        )
