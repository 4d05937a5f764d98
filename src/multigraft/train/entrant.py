"""An entrant of a run: a lane, what it is measured on, and what it came to so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from multigraft.errors import ConfigError
from multigraft.model import PeftModel
from multigraft.train.crew import ALONE, Crew
from multigraft.train.events import Evaluated
from multigraft.train.lane import Lane
from multigraft.train.watch import HeldOut, Watch


class Entrant:
    """One adapter of a run.

    Args:
        lane: its training.
        held_out: what it is measured on, if anything.
        watch: when, and what follows.
    """

    def __init__(
        self, lane: Lane, held_out: HeldOut | None = None, watch: Watch | None = None
    ) -> None:
        self.lane = lane
        self.held_out = held_out
        self.watch = watch or Watch()
        self.evaluations: list[Evaluated] = []
        self.best: float | None = None
        self.kept_step = 0
        """The step whose values the adapter has, or will have at its end."""
        self.best_values: list[Tensor] | None = None
        self.waited = 0
        self.end: str | None = None
        self.message = ""

    @property
    def name(self) -> str:
        """The adapter's."""
        return self.lane.adapter

    @property
    def is_over(self) -> bool:
        """Whether it has left the run."""
        return self.end is not None

    def is_due(self) -> bool:
        """Whether it is to be evaluated as it is now: before the first step, or after some."""
        if self.held_out is None or self.is_over:
            return False
        step = self.lane.step
        if self.evaluations and self.evaluations[-1].step == step:
            return False
        return step == 0 or self.watch.is_due(step, self.lane.steps)

    def reason_to_end(self) -> str | None:
        """Why it leaves the run now, or None."""
        if self.is_over:
            return None
        if self.lane.is_done:
            return "done"
        has_waited = self.watch.patience is not None and self.waited >= self.watch.patience
        return "stopped" if has_waited else None

    def evaluate(self, model: PeftModel, crew: Crew = ALONE) -> Evaluated:
        """Measure it, and keep its values where none were better.

        Args:
            crew: the processes that do so; all take what the first one has found.

        Raises:
            ConfigError: there is no measure of the name that is to be compared.
        """
        assert self.held_out is not None
        model.roster.set_active([self.name])
        values = crew.agreed(self.held_out.measure(model))
        wanted = self.watch.measure
        if wanted not in values:
            known = ", ".join(values)
            raise ConfigError(f"`measure` (={wanted!r}): what is measured here is {known}.")
        is_best = self.best is None or self.watch.is_better(values[wanted], self.best)
        if self.lane.step:  # before the first step there is nothing to keep, nor to compare with
            self.waited = 0 if is_best else self.waited + 1
            if is_best:
                self.best, self.kept_step = values[wanted], self.lane.step
                self.best_values = self.lane.values() if self.watch.keep_best else None
        found = Evaluated(self.name, self.lane.step, self.lane.steps, values, is_best)
        self.evaluations.append(found)
        return found

    @property
    def losses(self) -> list[float]:
        """The loss of every step."""
        return self.lane.losses

    def fail(self, message: str) -> None:
        """Leave the run as it was before the step that failed."""
        self.end, self.message, self.kept_step = "failed", message, self.lane.step

    def finish(self, why: str) -> None:
        """Leave the run, with the values that are to be kept."""
        if self.best_values is not None and self.kept_step != self.lane.step:
            self.lane.take(self.best_values)
        else:
            self.kept_step = self.lane.step
        self.end = why
        self.best_values = None
        self.lane.optimizer.state.clear()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything the rest of its run depends on."""
        tensors, lane = self.lane.state()
        for n, value in enumerate(self.best_values or ()):
            tensors[f"best.{n}"] = value
        evaluations = [[e.step, dict(e.values), e.is_best] for e in self.evaluations]
        return tensors, {
            "lane": lane,
            "evaluations": evaluations,
            "best": self.best,
            "kept_step": self.kept_step,
            "waited": self.waited,
            "end": self.end,
            "message": self.message,
        }

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go on from what `state` gave.

        Raises:
            CheckpointError: it is another adapter's; nothing was changed.
        """
        self.lane.restore(tensors, values["lane"])
        count = sum(name.startswith("best.") for name in tensors)
        self.best_values = [tensors[f"best.{n}"] for n in range(count)] or None
        steps = self.lane.steps
        self.evaluations = [
            Evaluated(self.name, step, steps, found, is_best)
            for step, found, is_best in values["evaluations"]
        ]
        self.best, self.kept_step = values["best"], values["kept_step"]
        self.waited, self.end, self.message = values["waited"], values["end"], values["message"]


def names_of(entrants: Sequence[Entrant]) -> list[str]:
    """Their adapters."""
    return [entrant.name for entrant in entrants]
