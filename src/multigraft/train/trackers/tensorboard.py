"""TensorBoard: ``tensorboard --logdir OUTPUT/tensorboard`` shows a run for each adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from multigraft.errors import MissingExtraError
from multigraft.train.trackers.contract import TRACKERS

FOLDER = "tensorboard"


class TensorBoard:
    """A folder of event files for each adapter, so that their curves lie over one another."""

    def __init__(self, output: Path, asked: Mapping[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError(
                "`log_to` tensorboard needs the package: pip install tensorboard"
            ) from error
        self._make = SummaryWriter
        self._folder = output / FOLDER
        self._writers: dict[str, Any] = {}

    def log(self, adapter: str, step: int, values: Mapping[str, float]) -> None:
        """Write scalars."""
        if adapter not in self._writers:
            self._writers[adapter] = self._make(str(self._folder / adapter))
        for name, value in values.items():
            self._writers[adapter].add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the files."""
        for writer in self._writers.values():
            writer.close()


TRACKERS.register("tensorboard", TensorBoard)
