"""Checkpoints of a run: everything that its next step depends on, whole or not there at all.

    output/checkpoints/round-000500/
      state.json               what was asked for, and where every adapter stands
      <adapter>.safetensors    its tensors, its optimiser's, and those of its best evaluation
      <adapter>/               the adapter itself, as PEFT reads it

Order, dropout and learning rate follow from seeds and step numbers, so no random state is kept.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from multigraft import checkpoint
from multigraft.atomic import place_folder, write_utf8
from multigraft.errors import CheckpointError, MultigraftWarning
from multigraft.model import PeftModel
from multigraft.reading import read_tensors
from multigraft.saving import files_of
from multigraft.train.entrant import Entrant
from multigraft.writing import write_tensors

FOLDER = "checkpoints"
STATE = "state.json"
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """One that was read.

    Args:
        asked: what the run was asked for.
        round: how many rounds it had made.
        seconds: how long it had run.
    """

    folder: Path
    asked: Mapping[str, Any]
    round: int
    seconds: float
    entrants: Mapping[str, Any]

    def restore(self, entrants: Sequence[Entrant]) -> None:
        """Let every entrant go on from here.

        Raises:
            CheckpointError: a file is damaged, or an adapter's tensors do not fit.
        """
        for entrant in entrants:
            tensors = read_tensors(self.folder / f"{entrant.name}.safetensors")
            entrant.restore(tensors, self.entrants[entrant.name])


class Saves:
    """The checkpoints of one run.

    Args:
        output: the run's directory.
        asked: what the run is asked for, as JSON holds it; a run that is resumed must ask the same.
        every: rounds between two checkpoints.
        keep: how many are kept.
    """

    def __init__(self, output: Path, asked: Mapping[str, Any], every: int, keep: int = 2) -> None:
        self.folder = output / FOLDER
        self.asked = json.loads(json.dumps(asked))
        self.every = every
        self.keep = keep
        self.last: Path | None = None

    def is_due(self, round: int) -> bool:
        """Whether there is a checkpoint after this round."""
        return round % self.every == 0

    def write(
        self,
        model: PeftModel,
        entrants: Sequence[Entrant],
        round: int,
        seconds: float,
        *,
        is_main: bool = True,
    ) -> Path:
        """Write a checkpoint, and remove those that are older than the ones that are kept.

        Args:
            is_main: whether this process writes. Where tensors lie in parts on several, all call.

        Raises:
            CheckpointError: the disk refuses; older checkpoints are as they were.
        """
        target = self.folder / f"round-{round:06d}"
        states = {entrant.name: entrant.state() for entrant in entrants}
        files = {name: files_of(model.roster, name, model.roster.root) for name in states}

        def fill(folder: Path) -> None:
            for name, (tensors, _) in states.items():
                write_tensors(_plain(tensors), folder / f"{name}.safetensors")
            checkpoint.save(folder, {folder / name: own for name, own in files.items()})
            state = {
                "format": FORMAT,
                "asked": self.asked,
                "round": round,
                "seconds": seconds,
                "entrants": {name: values for name, (_, values) in states.items()},
            }
            write_utf8(folder / STATE, json.dumps(state))

        if is_main:
            place_folder(target, fill)
            for old in found_in(self.folder)[self.keep :]:
                shutil.rmtree(old, ignore_errors=True)
        self.last = target
        return target

    def clear(self) -> None:
        """Remove all: the run is over."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def latest(self) -> Checkpoint | None:
        """The newest one that can be read, or None; a damaged one is told of and passed over.

        Raises:
            CheckpointError: it is of a run that was asked for something else.
        """
        for folder in found_in(self.folder):
            try:
                found = _read(folder)
            except CheckpointError as error:
                warnings.warn(f"{error} It is passed over.", MultigraftWarning, stacklevel=2)
                continue
            differences = _differences(found.asked, self.asked)
            if differences:
                raise CheckpointError(
                    f"{folder}: the run that this checkpoint is of was asked for something else: "
                    f"{'; '.join(differences[:5])}. Resume with what it began with, or choose "
                    "another output."
                )
            self.last = folder
            return found
        return None


def found_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest first."""
    return sorted(folder.glob("round-*"), reverse=True) if folder.is_dir() else []


def _read(folder: Path) -> Checkpoint:
    try:
        state = json.loads((folder / STATE).read_text("utf-8"))
        if state["format"] != FORMAT:
            raise ValueError(f"its format is {state['format']}, and this version reads {FORMAT}")
        found = Checkpoint(
            folder, state["asked"], state["round"], state["seconds"], state["entrants"]
        )
        missing = [n for n in found.entrants if not (folder / f"{n}.safetensors").is_file()]
        if missing:
            raise ValueError(f"{missing[0]}.safetensors is missing")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: the checkpoint cannot be read ({error}).") from error
    return found


def _differences(before: Any, now: Any, path: str = "") -> list[str]:
    """Where two values of JSON differ, as text."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = list(dict.fromkeys([*before, *now]))
        return [
            line
            for key in keys
            for line in _differences(before.get(key), now.get(key), f"{path}.{key}".strip("."))
        ]
    return [] if before == now else [f"`{path}` was {before!r} and is {now!r}"]


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
