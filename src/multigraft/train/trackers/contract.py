"""The contract of a tracker: somebody else's place for the curves of runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from multigraft.registry import Registry


class Tracker(Protocol):
    """Takes numbers as a run goes; one for the whole run."""

    def log(self, adapter: str, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name, such as ``loss`` and ``eval/loss``, of one adapter after a step."""

    def close(self) -> None:
        """Nothing comes any more."""


Open = Callable[[Path, Mapping[str, Any]], Tracker]
"""Called with the run's output directory and what the run is asked for, as JSON holds it."""

TRACKERS: Registry[Open] = Registry("tracker")
