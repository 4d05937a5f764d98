"""Weights & Biases and trackio, which has its interface: a run, ``adapter/name`` for each curve."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from multigraft.errors import MissingExtraError
from multigraft.train.trackers.contract import TRACKERS

PROJECT = "multigraft"


class Hosted:
    """A run of a package with ``init``, ``log`` and ``finish``.

    Args:
        package: its name. Keys, servers and project names are its own environment variables.
    """

    def __init__(self, package: str, output: Path, asked: Mapping[str, Any]) -> None:
        try:
            module: Any = import_module(package)
        except ImportError as error:
            raise MissingExtraError(
                f"`log_to` {package} needs the package: pip install {package}"
            ) from error
        self._run = module.init(project=PROJECT, name=output.name or PROJECT, config=dict(asked))

    def log(self, adapter: str, step: int, values: Mapping[str, float]) -> None:
        """Send numbers; each adapter counts its own steps, so the step goes as a number too."""
        named = {f"{adapter}/{name}": value for name, value in values.items()}
        self._run.log({**named, f"{adapter}/step": step})

    def close(self) -> None:
        """Say that the run is over."""
        self._run.finish()


for _package in ("wandb", "trackio"):
    TRACKERS.register(_package, partial(Hosted, _package))
