"""The recipe: everything that decides one adapter's training besides its data and its config.

The learning rate is a function of the step alone, so that a run can be taken up at any step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from multigraft.errors import ConfigError, did_you_mean

SCHEDULES = ("constant", "cosine", "linear")
LARGEST_LR = 1e6
"""Beyond any use; far above it, steps no longer fit float32."""
LARGEST_SEED = 2**43
"""A pass over the data is seeded with a million times as much, which torch must still take."""


@dataclass(frozen=True)
class Recipe:
    """An optimiser with warm-up, a schedule and gradient clipping.

    Args:
        epochs: passes over the data; ignored when ``steps`` is given.
        steps: optimiser steps.
        batch_size: examples that run at once.
        accumulate: how many such batches make one step of the optimiser.
        lr: peak learning rate.
        schedule: what follows the warm-up: ``"cosine"`` or ``"linear"`` to zero, or ``"constant"``.
        warmup: share of the steps over which the learning rate rises; from 1 on, their number.
        weight_decay: AdamW's.
        clip: largest norm of the adapter's gradient; 0 clips nothing.
        group_by_length: put examples of about the same length into a batch.
        seed: decides the initial values, the order of the data and dropout.
        optimizer: by name, see `multigraft.train.optimizer`.
        optimizer_options: what it takes besides.

    Raises:
        ConfigError: a value is outside what its field allows.
    """

    epochs: float = 3.0
    steps: int | None = None
    batch_size: int = 8
    accumulate: int = 1
    lr: float = 2e-4
    schedule: str = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    group_by_length: bool = False
    seed: int = 0
    optimizer: str = "adamw"
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        at_least_one = "an integer of at least 1"
        _require("epochs", self.epochs, math.isfinite(self.epochs) and self.epochs > 0, "above 0")
        _require("steps", self.steps, self.steps is None or _is_count(self.steps), at_least_one)
        _require("batch_size", self.batch_size, _is_count(self.batch_size), at_least_one)
        _require("accumulate", self.accumulate, _is_count(self.accumulate), at_least_one)
        _require("lr", self.lr, 0 < self.lr <= LARGEST_LR, f"above 0, up to {LARGEST_LR:g}")
        for name in ("warmup", "weight_decay", "clip"):
            value = getattr(self, name)
            _require(name, value, math.isfinite(value) and value >= 0, "a number of at least 0")
        in_range = isinstance(self.seed, int) and 0 <= self.seed < LARGEST_SEED
        _require("seed", self.seed, in_range, f"at least 0 and below {LARGEST_SEED}")
        if self.schedule not in SCHEDULES:
            raise ConfigError(
                f"Recipe: `schedule` (={self.schedule!r}) must be one of {', '.join(SCHEDULES)}."
                f"{did_you_mean(str(self.schedule), SCHEDULES)}"
            )

    def total_steps(self, examples: int) -> int:
        """Optimiser steps for a data set of this many examples."""
        if self.steps is not None:
            return self.steps
        return max(1, math.ceil(self.epochs * examples / (self.batch_size * self.accumulate)))

    def lr_at(self, step: int, total: int) -> float:
        """Learning rate of step ``step`` (from 0) of ``total``."""
        warmup = self.warmup if self.warmup >= 1 else self.warmup * total
        if step < warmup:
            return self.lr * (step + 1) / (warmup + 1)
        if self.schedule == "constant":
            return self.lr
        done = (step - warmup) / max(1.0, total - warmup)
        if self.schedule == "linear":
            return self.lr * (1.0 - done)
        return self.lr * 0.5 * (1.0 + math.cos(math.pi * done))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _require(name: str, value: object, is_met: bool, required: str) -> None:
    if not is_met:
        raise ConfigError(f"Recipe: `{name}` (={value!r}) must be {required}.")
