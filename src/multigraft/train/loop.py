"""The training loop: one adapter's lane from its present step to its last.

`multigraft.train.run` does so for several at once, with evaluation and checkpoints.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from multigraft.model import PeftModel
from multigraft.train.events import Progress
from multigraft.train.lane import Lane
from multigraft.train.together import check_ready, in_training, step

OnStep = Callable[[Progress], None]


def train(model: PeftModel, lane: Lane, on_step: OnStep | None = None) -> list[float]:
    """Train one adapter; it is the active one from here on.

    The same lane on the same base gives the same adapter: order, dropout and schedule follow from
    the recipe's seed, and the caller's own random state is as it was afterwards.

    Returns:
        The loss of every step.

    Raises:
        StateError: the adapter is merged into the base, or adapters are disabled.
        TrainingError: the loss or the gradient is not finite; the message names the step.
    """
    check_ready(model, [lane.adapter])
    model.set_adapter(lane.adapter)
    losses, start = [], time.monotonic()
    with in_training(model, [lane]):
        while not lane.is_done:
            (done,) = step(model, [lane])
            if done.error is not None:
                raise done.error
            losses.append(done.loss)
            if on_step is not None:
                on_step(Progress.of(lane, done, time.monotonic() - start))
    return losses
