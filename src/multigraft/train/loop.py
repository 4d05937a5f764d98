"""The training loop: one adapter's lane from its present step to its last."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from multigraft.errors import StateError, TrainingError
from multigraft.model import PeftModel
from multigraft.schedule import penalties
from multigraft.train.batches import Batch
from multigraft.train.lane import Lane
from multigraft.train.seeding import seeded
from multigraft.train.tasks.causal_lm import learned_tokens, row_losses


@dataclass(frozen=True)
class Progress:
    """Where a run stands after a step.

    Args:
        loss: mean over the learned tokens of this step's batch, before the update.
        tokens: tokens seen in this run, padding not counted.
        seconds: since the run began.
    """

    adapter: str
    step: int
    steps: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Mean speed since the run began."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float:
        """Time to the last step at the mean speed so far."""
        return self.seconds / self.step * (self.steps - self.step)


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
    _refuse_unready(model, lane.adapter)
    model.set_adapter(lane.adapter)
    device = lane.parameters[0].device
    losses, tokens, start = [], 0, time.monotonic()
    with _training(model, lane), seeded(lane.recipe.seed, device):
        while not lane.is_done:
            batch, lr = lane.batch().to(device), lane.lr
            with _enough_memory(lane):
                losses.append(_gradients(model, lane, batch))
                norm = lane.update()
            tokens += batch.tokens
            if on_step is not None:
                seconds = time.monotonic() - start
                where = (lane.adapter, lane.step, lane.steps)
                on_step(Progress(*where, losses[-1], lr, norm, tokens, seconds))
    return losses


def _gradients(model: PeftModel, lane: Lane, batch: Batch) -> float:
    """Give the lane's parameters the batch's gradients; the mean loss over its learned tokens."""
    logits = model(**batch.inputs, use_cache=False).logits
    loss = row_losses(logits, batch.labels).sum() / max(1, learned_tokens(batch.labels))
    value = _finite(float(loss.detach()), lane)
    for term in penalties(model.roster):
        loss = loss + term.to(loss.device)
    loss.backward()
    return value


@contextmanager
def _enough_memory(lane: Lane) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"adapter `{lane.adapter}`, step {lane.step + 1} of {lane.steps}: the device is out of "
            f"memory. Lower `batch_size` (={lane.recipe.batch_size}) or the length of the examples."
        ) from error


@contextmanager
def _training(model: PeftModel, lane: Lane) -> Iterator[None]:
    was_training = model.training
    model.train()
    lane.optimizer.zero_grad(set_to_none=True)
    try:
        yield
    finally:
        model.train(was_training)
        lane.optimizer.zero_grad(set_to_none=True)


def _refuse_unready(model: PeftModel, adapter: str) -> None:
    if adapter in model.roster.merged:
        raise StateError(
            f"adapter `{adapter}` is merged into the base, so training it would change nothing. "
            "Call unmerge_adapter() first."
        )
    if not model.roster.enabled:
        raise StateError("adapters are disabled. Leave disable_adapter() before training.")


def _finite(loss: float, lane: Lane) -> float:
    if loss != loss or loss in (float("inf"), float("-inf")):
        raise TrainingError(
            f"adapter `{lane.adapter}`, step {lane.step + 1} of {lane.steps}: the loss is {loss}. "
            f"Lower the learning rate (={lane.recipe.lr:g}), or train in float32."
        )
    return loss
