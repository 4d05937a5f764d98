"""A run's loss by step, from the log beside an adapter: `train_log.jsonl`, or the Trainer's own."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

LOG = "train_log.jsonl"
TRAINERS = "trainer_state.json"
"""What transformers' `Trainer` writes beside a checkpoint."""
LARGEST = 64 << 20
POINTS = 400
"""What a curve has at most; longer ones are averaged over neighbouring steps."""


@dataclass(frozen=True)
class Curve:
    """A loss over steps.

    Args:
        adapter: whose training it was, as the log says; ``, held out`` follows where it is the
            loss on held-out examples.
        points: (step, loss), by step.
        each: over how many logged steps a point is the mean.
        source: the file's name.
    """

    adapter: str
    points: tuple[tuple[int, float], ...]
    each: int
    source: str


def read_curves(folder: Path, adapter: str) -> list[Curve]:
    """The curves that lie beside an adapter; none where there is no log, or none to be read.

    Args:
        adapter: its name, for logs that give none.
    """
    for name, rows in ((LOG, _lines), (TRAINERS, _history)):
        path = folder / name
        try:
            if path.is_file() and path.stat().st_size <= LARGEST:
                return [*_curves(rows(path), adapter, name)]
        except (OSError, ValueError, RecursionError):
            continue  # a log is an extra: a damaged one costs its curve alone
    return []


def _lines(path: Path) -> Iterator[Any]:
    """The rows of a JSONL file; a last line that was cut off is passed over."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            yield json.loads(line)
        except (ValueError, RecursionError):
            continue


def _history(path: Path) -> Iterator[Any]:
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = found.get("log_history") if isinstance(found, dict) else None
    yield from rows if isinstance(rows, list) else ()


def _curves(rows: Iterable[Any], adapter: str, source: str) -> Iterator[Curve]:
    by_name: dict[str, dict[int, float]] = {}
    for row in rows:
        if not isinstance(row, dict):
            continue
        step, name = row.get("step"), row.get("adapter")
        if not _is_number(step):
            continue
        measured = row.get("eval")
        held_out = measured.get("loss") if isinstance(measured, dict) else row.get("eval_loss")
        name = name if isinstance(name, str) else adapter
        for curve, loss in ((name, row.get("loss")), (f"{name}, held out", held_out)):
            if _is_number(loss):
                by_name.setdefault(curve, {})[int(step)] = float(loss)
    for name, found in by_name.items():
        points = sorted(found.items())
        each = math.ceil(len(points) / POINTS)
        yield Curve(name, tuple(_averaged(points, each)), each, source)


def _averaged(points: list[tuple[int, float]], each: int) -> Iterator[tuple[int, float]]:
    for start in range(0, len(points), each):
        part = points[start : start + each]
        yield part[-1][0], sum(loss for _, loss in part) / len(part)


def _is_number(value: Any) -> TypeGuard[float]:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) < 1e15  # which NaN is not either
