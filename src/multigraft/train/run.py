"""A run: several adapters learn at once on one base, each until its own end.

live = all entrants
while live:  one step of each, together ──> evaluate those that are due ──> let go of those
             that are done, have waited enough or failed ──> a checkpoint where one is due
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence

from multigraft.errors import CheckpointError, MultigraftWarning, TrainingError
from multigraft.model import PeftModel
from multigraft.train.crew import ALONE, Crew
from multigraft.train.entrant import Entrant, names_of
from multigraft.train.events import Evaluated, Event, Finished, OnEvent, Progress, Saved
from multigraft.train.saves import Checkpoint, Saves
from multigraft.train.together import check_ready, in_training, step


class Run:
    """Adapters of one model that learn side by side.

    Args:
        entrants: at least one, of different adapters.
        saves: its checkpoints, if there are to be any.
        on_event: told of everything that happens.
        on_finish: called with an entrant whose values are final, to save its adapter.
        crew: the processes that make the run; the first one tells and saves.
    """

    def __init__(
        self,
        model: PeftModel,
        entrants: Sequence[Entrant],
        *,
        saves: Saves | None = None,
        on_event: OnEvent | None = None,
        on_finish: Callable[[Entrant], None] | None = None,
        crew: Crew = ALONE,
    ) -> None:
        self.model = model
        self.entrants = list(entrants)
        self.crew = crew
        self.saves = saves if crew.is_main or crew.is_parted else None
        self.on_event = on_event or (lambda event: None)
        self.on_finish = on_finish or (lambda entrant: None)
        self.round = 0
        self._before = 0.0
        """Seconds that the run had taken when it was put down."""
        self._start = time.monotonic()

    @property
    def live(self) -> list[Entrant]:
        """Those that still learn."""
        return [entrant for entrant in self.entrants if not entrant.is_over]

    @property
    def seconds(self) -> float:
        """How long it has run, pauses not counted."""
        return self._before + time.monotonic() - self._start

    def resume(self, found: Checkpoint) -> None:
        """Go on from a checkpoint.

        Raises:
            CheckpointError: it does not fit.
        """
        found.restore(self.entrants)
        self.round, self._before = found.round, found.seconds

    def go(self) -> None:
        """Make every step of every entrant.

        Raises:
            StateError: an adapter is merged into the base, or adapters are disabled.
            TrainingError: an adapter failed, or the device is out of memory. The others are done
                and saved; the failed one is in the last checkpoint as it was before that step.
            CheckpointError: the disk refuses a finished adapter.
        """
        names = names_of(self.entrants)
        check_ready(self.model, names)
        self.model.roster.set_requires_grad(names, True)
        self._start = time.monotonic()
        with in_training(self.model, [entrant.lane for entrant in self.live]):
            try:
                self._settle(self.live)
                while self.live:
                    self._go_round()
            except (KeyboardInterrupt, TrainingError, CheckpointError):
                if not self.crew.is_parted:  # the others may be elsewhere
                    self.save()
                raise
        self.model.roster.set_active(names[:1])
        failed = [e.message for e in self.entrants if e.end == "failed"]
        if failed:
            last = None if self.saves is None else self.saves.last
            where = "" if last is None else f" Each is kept as it was before in {last}."
            raise TrainingError(f"{' '.join(failed)}{where}")

    def save(self) -> None:
        """Write a checkpoint; a disk that refuses is warned of, and the last one stays."""
        if self.saves is None:
            return
        try:
            folder = self.saves.write(
                self.model, self.entrants, self.round, self.seconds, is_main=self.crew.is_main
            )
        except CheckpointError as error:
            warnings.warn(str(error), MultigraftWarning, stacklevel=2)
        else:
            self.on_event(Saved(folder, self.round))

    def _go_round(self) -> None:
        live = self.live
        results = step(self.model, [entrant.lane for entrant in live], self.crew)
        self.round += 1
        for entrant, done in zip(live, results, strict=True):
            if done.error is None:
                self.on_event(Progress.of(entrant.lane, done, self.seconds))
            else:
                entrant.fail(str(done.error))
                self._say_end(entrant)
        self._settle(live)
        has_failed = any(entrant.end == "failed" for entrant in live)
        is_due = self.saves is not None and self.saves.is_due(self.round)
        if has_failed or (is_due and self.live):
            self.save()

    def _settle(self, entrants: Sequence[Entrant]) -> None:
        """Do what is due after the steps that these have made, unless it is done already.

        So a run that was put down in the middle of it goes on as if it had not been.
        """
        for entrant in entrants:
            if entrant.is_due():
                self._evaluate(entrant)
            why = entrant.reason_to_end()
            if why is not None:
                entrant.finish(why)
                self.on_finish(entrant)
                self._say_end(entrant)

    def _evaluate(self, entrant: Entrant) -> None:
        found: Evaluated = entrant.evaluate(self.model, self.crew)
        self.on_event(found)

    def _say_end(self, entrant: Entrant) -> None:
        lane = entrant.lane
        event: Event = Finished(
            entrant.name,
            lane.step,
            lane.steps,
            str(entrant.end),
            entrant.kept_step,
            entrant.message,
        )
        self.on_event(event)
