"""Forwards for measuring: a task's examples through the model, in batches, nothing learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from multigraft.model import PeftModel
from multigraft.train.batches import Batch
from multigraft.train.tasks.contract import Task

T = TypeVar("T")


def gathered(
    task: Task,
    model: PeftModel,
    examples: Sequence[Any],
    take: Callable[[Any, Batch], T],
    *,
    pad: int,
    batch_size: int,
) -> list[T]:
    """What ``take`` makes of the outputs of each batch, with the active adapters.

    The model is in evaluation mode meanwhile.
    """

    def run(batch: Batch) -> T:
        return take(model(**batch.inputs, **task.call), batch)

    return each_batch(task, model, examples, run, pad=pad, batch_size=batch_size)


def each_batch(
    task: Task,
    model: PeftModel,
    examples: Sequence[Any],
    run: Callable[[Batch], T],
    *,
    pad: int,
    batch_size: int,
) -> list[T]:
    """What ``run`` makes of each batch, prepared and on the model's device."""
    device = next(model.parameters()).device
    found = []
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(examples), batch_size):
                batch = task.collate(examples[start : start + batch_size], pad).to(device)
                found.append(run(task.prepare(model, batch)))
    finally:
        model.train(was_training)
    return found
