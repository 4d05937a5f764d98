"""A pair of small adapters on disk, and the page on them with every part that there can be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from multigraft.report import write_report
from tests.inspection.adapters import net, write


@pytest.fixture
def pair(tmp_path) -> list[Path]:
    return write_pair(tmp_path)


def write_pair(folder: Path, first: str = "first") -> list[Path]:
    return [write(folder / first), write(folder / "second", seed=2, target_modules=["up"])]


def write_full(folder: Path, name: str = "first") -> Path:
    """The page on a pair of adapters beside their base, with a log of one's training."""
    first, second = write_pair(folder, name)
    rows = [{"step": n, "loss": 1 / n, "adapter": name} for n in range(1, 60)]
    (first / "train_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_report([first, second], folder / "report.html", base=net())
    return folder / "report.html"
