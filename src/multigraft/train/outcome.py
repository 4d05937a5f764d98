"""A job that is ready to go, and what it comes to."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from multigraft.errors import MultigraftError, MultigraftWarning, TrainingError
from multigraft.model import PeftModel
from multigraft.train.card import write_card
from multigraft.train.crew import ALONE, Crew
from multigraft.train.entrant import Entrant
from multigraft.train.evaluate import share_right
from multigraft.train.events import Evaluated, Event, OnEvent, Progress
from multigraft.train.log import RunLog
from multigraft.train.records import BadLine
from multigraft.train.run import Run
from multigraft.train.saves import Checkpoint, Saves
from multigraft.train.tasks import write_task
from multigraft.train.trackers import Tracking

if TYPE_CHECKING:
    from multigraft.train.job import Job


REPORT = "report.html"


@dataclass(frozen=True)
class Outcome:
    """What a run came to for one adapter; the evaluation's parts are empty without held-out data.

    Args:
        losses: of every step.
        folder: where the adapter was saved.
        why: ``"done"``, or ``"stopped"`` early.
        kept_step: the step whose values were saved.
        evaluations: in their order, the first before training.
        exact_match: before and after, from 0 to 1.
    """

    name: str
    losses: list[float]
    folder: Path
    why: str = "done"
    kept_step: int = 0
    evaluations: list[Evaluated] = field(default_factory=list)
    exact_match: tuple[float, float] | None = None

    @property
    def eval_loss(self) -> tuple[float, float] | None:
        """Before, and of the values that were saved."""
        if not self.evaluations:
            return None
        kept = [e for e in self.evaluations if e.step == self.kept_step] or self.evaluations[-1:]
        return self.evaluations[0].values["loss"], kept[0].values["loss"]


@dataclass
class Prepared:
    """A job that is ready to go.

    Args:
        bad: lines that are left out.
        cut: how many examples were longer than ``max_length``.
        found: the checkpoint that the run goes on from.
        crew: the processes that make the run.
    """

    job: Job
    model: PeftModel
    tokenizer: Any
    entrants: list[Entrant]
    saves: Saves
    tracking: Tracking
    bad: Sequence[BadLine]
    cut: int
    found: Checkpoint | None = None
    crew: Crew = ALONE

    def __post_init__(self) -> None:
        self.logs: dict[str, RunLog] = {}
        self.saved: dict[str, Path] = {}
        self.report: Path | None = None
        writes = self.saves if self.job.save_every else None
        self.process = Run(
            self.model, self.entrants, saves=writes, on_finish=self._save, crew=self.crew
        )
        if self.found is not None:
            self.process.resume(self.found)
        for entrant in self.entrants:
            at = entrant.lane.step if self.found is not None else None
            self.logs[entrant.name] = RunLog(self.job.folder(entrant.name), at)

    def run(self, on_event: OnEvent | None = None) -> list[Outcome]:
        """Train, evaluate and save; one outcome for each adapter.

        Raises:
            TrainingError: an adapter's training diverged, or the memory does not suffice.
            CheckpointError: the disk refuses an adapter.
        """

        def tell(event: Event) -> None:
            if not self.crew.is_main:
                return
            if isinstance(event, (Progress, Evaluated)):
                self.logs[event.adapter](event)
            self.tracking(event)
            if on_event is not None:
                on_event(event)

        self.process.on_event = tell
        if self.found is None and self.crew.is_main:
            self.saves.clear()  # those of a run that this one replaces
        before = self._exact_matches()
        try:
            self.process.go()
        except Exception as error:  # not Ctrl-C, after which `rescue` says what is where
            self._drop_logs()
            if isinstance(error.__cause__, torch.OutOfMemoryError):
                raise TrainingError(f"{error} {self._advice()}") from error
            raise
        finally:
            self.tracking.close()
        for entrant in self.entrants:  # those that were over when the run was taken up
            if entrant.name not in self.saved:
                self._save(entrant)
        after = self._exact_matches()
        if self.crew.is_main:
            self.saves.clear()
            if self.job.report:
                self._report()
        return [
            Outcome(
                e.name,
                e.losses,
                self.saved[e.name],
                str(e.end),
                e.kept_step,
                e.evaluations,
                (before[e.name], after[e.name]) if e.name in after else None,
            )
            for e in self.entrants
        ]

    def rescue(self) -> str:
        """After an interrupt: what is where, and how to go on."""
        made = f"{self.process.round} rounds"
        if all(e.is_over for e in self.entrants):
            return f"all adapters are saved in {self.job.output}; only the evaluation is missing"
        if not self.process.round:
            self._drop_logs()
            return "no step was made, and nothing was saved"
        if self.saves.last is None:
            self._drop_logs()
            return f"the {made} that were made are lost: checkpoints are switched off"
        done = [f"`{name}`" for name in self.saved]
        whole = f" {', '.join(done)} is saved already;" if done else ""
        return (
            f"{whole} everything as it was after {made} is saved in {self.saves.last}. The same "
            "command with --resume goes on from there"
        ).strip()

    @property
    def base(self) -> nn.Module:
        """The base model."""
        return self.model.get_base_model()

    def _save(self, entrant: Entrant) -> None:
        name = entrant.name
        self.saved[name] = self.job.folder(name)
        self.model.save_pretrained(self.job.output, selected_adapters=[name])
        if not self.crew.is_main:
            return
        write_task(self.job.folder(name), entrant.lane.task, self.base)
        job = next(adapter for adapter in self.job.adapters if adapter.name == name)
        write_card(self.job.folder(name), self.model.peft_config[name], job, entrant)
        if name in self.logs:
            self.logs[name].keep()

    def _report(self) -> None:
        from multigraft.report import write_report

        page = Path(self.job.output) / REPORT
        try:
            write_report([str(folder) for folder in self.saved.values()], page)
        except MultigraftError as error:  # the adapters are saved; the page is an extra
            warnings.warn(f"no report was written: {error}", MultigraftWarning, stacklevel=3)
        else:
            self.report = page

    def _exact_matches(self) -> dict[str, float]:
        """The share of right answers of every adapter that is asked for some."""
        found = {}
        for entrant in self.entrants:
            if entrant.held_out is not None and entrant.end != "failed":
                self.model.roster.set_active([entrant.name])
                answers = entrant.held_out.answers(self.model)
                if answers:
                    found[entrant.name] = share_right(answers)
        agreed: dict[str, float] = self.crew.agreed(found)
        return agreed

    def _advice(self) -> str:
        """What to change after the memory did not suffice, and how much that saves."""
        from multigraft.planning import out_of_memory, request_of

        return out_of_memory(request_of(self.job, gpus=self.crew.size))

    def _drop_logs(self) -> None:
        """Where there is nothing to go on from, nothing is left of the run."""
        if self.saves.last is None:
            for log in self.logs.values():
                log.drop()
            with suppress(OSError):
                self.saves.folder.rmdir()
