"""A run's log: one line of JSON a step, written as training goes, beside the adapter.

    {"adapter": "dates", "step": 3, "steps": 90, "loss": 1.25, "lr": 0.0002, …}

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
from typing import IO

from multigraft.errors import MultigraftWarning
from multigraft.train.loop import Progress

LOG_NAME = "train_log.jsonl"
UNFINISHED = f"{LOG_NAME}.part"


class RunLog:
    """The log of one run; it is called after every step.

    Args:
        folder: where the adapter will lie; made at the first step.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: IO[str] | None = None
        self._made: list[Path] = []
        self._is_broken = False

    def __call__(self, now: Progress) -> None:
        """Write a line; a disk that refuses is warned of once, and training goes on."""
        if self._is_broken:
            return
        try:
            if self._file is None:
                self._file = self._open()
            self._file.write(json.dumps(asdict(now)) + "\n")
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
        return open(self.folder / UNFINISHED, "w", encoding="utf-8")

    def _close(self) -> bool:
        """Whether there was anything to close."""
        if self._file is None:
            return False
        with suppress(OSError):
            self._file.close()
        self._file = None
        return True
