"""A run's log: one line of JSON a step, written as training goes, beside the adapter.

    {"adapter": "dates", "step": 3, "steps": 90, "loss": 1.25, "lr": 0.0002, …}
    {"adapter": "dates", "step": 3, "steps": 90, "eval": {"loss": 1.5}, "is_best": true}

Until the adapter is saved the file has another name, so that a log lies beside the adapter whose
training it tells of, and a run that saves nothing leaves nothing.
"""

from __future__ import annotations

import json
import os
import warnings
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from multigraft.errors import MultigraftWarning
from multigraft.train.events import Evaluated, Progress

LOG_NAME = "train_log.jsonl"
UNFINISHED = f"{LOG_NAME}.part"


class RunLog:
    """The log of one run; it is called after every step and evaluation.

    Args:
        folder: where the adapter will lie; made at the first step.
        resumed_at: the step that the run goes on from: what was logged up to it stays, and the rest
            will be written again.
    """

    def __init__(self, folder: Path, resumed_at: int | None = None) -> None:
        self.folder = folder
        self.resumed_at = resumed_at
        self._file: IO[str] | None = None
        self._made: list[Path] = []
        self._is_broken = False

    def __call__(self, now: Progress | Evaluated) -> None:
        """Write a line; a disk that refuses is warned of once, and training goes on."""
        if self._is_broken:
            return
        try:
            if self._file is None:
                self._file = self._open()
            self._file.write(json.dumps(_line(now)) + "\n")
            self._file.flush()
        except OSError as error:
            self._is_broken = True
            warnings.warn(
                f"{self.folder / UNFINISHED}: the log of this run stops here ({error}).",
                MultigraftWarning,
                stacklevel=2,
            )

    def keep(self) -> None:
        """Give it its name: the adapter is saved."""
        if self._close():
            with suppress(OSError):
                os.replace(self.folder / UNFINISHED, self.folder / LOG_NAME)

    def drop(self) -> None:
        """Leave no trace: nothing was saved."""
        if self._close():
            with suppress(OSError):
                (self.folder / UNFINISHED).unlink()
        for folder in reversed(self._made):
            with suppress(OSError):  # something else lies there by now
                folder.rmdir()
        self._made = []

    def _open(self) -> IO[str]:
        missing = [p for p in (self.folder, *self.folder.parents) if not p.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._made = missing[::-1]
        path = self.folder / UNFINISHED
        kept = [] if self.resumed_at is None else _kept(path, self.resumed_at)
        file = open(path, "w", encoding="utf-8")  # noqa: SIM115 - open as long as the run lasts
        file.writelines(f"{line}\n" for line in kept)
        return file

    def _close(self) -> bool:
        """Whether there was anything to close."""
        if self._file is None:
            return False
        with suppress(OSError):
            self._file.close()
        self._file = None
        return True


def _line(now: Progress | Evaluated) -> dict[str, Any]:
    values = asdict(now)
    if "values" in values:
        values["eval"] = dict(values.pop("values"))
    return values


def _kept(path: Path, step: int) -> list[str]:
    """The lines up to this step; the last one of a killed run may be half a line."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError:
        return []
    kept = []
    for line in lines:
        with suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                kept.append(line)
    return kept
