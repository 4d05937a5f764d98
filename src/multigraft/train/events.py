"""What happens in a run, as it happens: for progress bars, logs, curves and trackers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multigraft.train.lane import Lane
    from multigraft.train.together import Stepped


@dataclass(frozen=True)
class Progress:
    """Where an adapter stands after a step.

    Args:
        loss: mean over what this step learned from, before the update.
        tokens: tokens seen so far, padding not counted.
        seconds: since the run began, pauses not counted.
    """

    adapter: str
    step: int
    steps: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    seconds: float

    @classmethod
    def of(cls, lane: Lane, done: Stepped, seconds: float) -> Progress:
        """What a step of this lane came to."""
        numbers = (done.loss, done.lr, done.grad_norm, lane.tokens, seconds)
        return cls(lane.adapter, lane.step, lane.steps, *numbers)

    @property
    def tokens_per_second(self) -> float:
        """Mean speed since the run began."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float:
        """Time to the last step at the mean speed so far."""
        return self.seconds / self.step * (self.steps - self.step)


@dataclass(frozen=True)
class Evaluated:
    """What an adapter came to on its held-out examples.

    Args:
        values: measures by name; ``loss`` is always one.
        is_best: whether no evaluation before was as good.
    """

    adapter: str
    step: int
    steps: int
    values: Mapping[str, float] = field(default_factory=dict)
    is_best: bool = False


@dataclass(frozen=True)
class Finished:
    """An adapter leaves the batch.

    Args:
        why: ``"done"``, ``"stopped"`` (early), or ``"failed"``.
        kept: the step whose values it has now.
        message: what failed.
    """

    adapter: str
    step: int
    steps: int
    why: str
    kept: int
    message: str = ""


@dataclass(frozen=True)
class Saved:
    """A checkpoint of the run is whole."""

    folder: Path
    round: int


Event = Progress | Evaluated | Finished | Saved
OnEvent = Callable[[Event], None]
