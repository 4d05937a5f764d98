"""Where else the curves of a run go: one file a kind of tracker."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from multigraft.errors import MultigraftWarning
from multigraft.train.events import Evaluated, Event, Progress
from multigraft.train.trackers import hosted, tensorboard
from multigraft.train.trackers.contract import TRACKERS, Tracker

__all__ = ["TRACKERS", "Tracker", "Tracking", "hosted", "tensorboard"]

SHOWN = ("loss", "lr", "grad_norm", "tokens")


class Tracking:
    """Tells several trackers what happens; one that fails is warned of once and let go.

    Args:
        names: of the trackers.

    Raises:
        MissingExtraError: a tracker's package is not installed.
        UnsupportedError: there is no such tracker.
    """

    def __init__(self, names: Sequence[str], output: Path, asked: Mapping[str, Any]) -> None:
        makes = {name: TRACKERS[name] for name in names}
        self._trackers = {name: make(output, asked) for name, make in makes.items()}

    def __call__(self, event: Event) -> None:
        """Pass on the numbers of steps and evaluations."""
        if isinstance(event, Progress):
            values = asdict(event)
            self._log(event, {name: values[name] for name in SHOWN})
        elif isinstance(event, Evaluated):
            self._log(event, {f"eval/{name}": value for name, value in event.values.items()})

    def close(self) -> None:
        """Nothing comes any more."""
        for name in list(self._trackers):
            self._try(name, lambda tracker: tracker.close())

    def _log(self, event: Progress | Evaluated, values: Mapping[str, float]) -> None:
        for name in list(self._trackers):
            self._try(name, lambda tracker: tracker.log(event.adapter, event.step, values))

    def _try(self, name: str, call: Any) -> None:
        try:
            call(self._trackers[name])
        except Exception as error:  # somebody else's service must not end a run
            del self._trackers[name]
            warnings.warn(
                f"{name} takes no more of this run's curves ({error}); they go on in "
                "train_log.jsonl.",
                MultigraftWarning,
                stacklevel=3,
            )
