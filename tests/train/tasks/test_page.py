"""The page on tasks: its Python runs, and it names every task, option and measure."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

from multigraft.train.formats import read_row
from multigraft.train.tasks import TASKS
from tests.tiny_base import write_lines
from tests.train.tasks.bases import opinions

PAGE = Path(__file__).resolve().parents[3] / "docs" / "tasks.md"


def test_it_runs_as_written(folders, tmp_path, monkeypatch):
    write_lines(tmp_path / "reviews.jsonl", opinions(24))
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8").replace("MODEL", str(folders("bert")))
    first, second = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    names: dict[str, object] = {}
    exec(compile(second, "tasks.md", "exec"), names)  # what it saves, the other one loads
    exec(compile(first, "tasks.md", "exec"), names)
    assert names["found"]["accuracy"] > 0.5
    assert names["label"] in ("good", "bad")


def test_every_task_and_option_is_named_and_every_row_can_be_read():
    text = PAGE.read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w-]+)` \| .* \| `(\{.*\})` \|", text, re.MULTILINE))
    for name, task in TASKS.items():
        assert f"| `{name}` |" in text
        for option in dataclasses.fields(task):
            assert f"`{option.name}`" in text
        if name in rows:
            assert isinstance(read_row(json.loads(rows[name]), 1, kinds=task.records), task.records)
    assert len(rows) == len(list(TASKS)) - 1
