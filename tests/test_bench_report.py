"""bench/_report.py: what a report writes."""

from __future__ import annotations

import json
import sys

import pytest

from bench import _report


@pytest.fixture
def written(tmp_path):
    report = _report.Report("speed", "How fast.", command="python bench/speed.py")
    report.row(case="one", ms=[1.0, 2.0, 3.0, 4.0, 5.0], calls=3).row(case="a|b", peak=0.123456)
    path = report.note("On a quiet machine.").write(tmp_path)
    return json.loads(path.read_text()), path.with_suffix(".md").read_text()


def test_json_keeps_samples_and_says_where_they_come_from(written):
    facts, _ = written
    assert facts["rows"][0]["ms"] == {
        "median": 3.0,
        "low": 2.0,
        "high": 4.0,
        "samples": [1.0, 2.0, 3.0, 4.0, 5.0],
    }
    assert facts["command"] == "python bench/speed.py"
    assert {"python", "torch", "multigraft"} <= set(facts["versions"])
    assert {"cpu", "cores", "memory", "threads"} <= set(facts["hardware"])


def test_the_table_has_every_column_and_shows_medians_with_spread(written):
    _, text = written
    assert "| case | ms | calls | peak |" in text
    assert "| one | 3 (2 – 4) | 3 |  |" in text
    assert "| a\\|b |  |  | 0.1235 |" in text
    assert "On a quiet machine." in text


def test_the_table_is_printed(tmp_path, capsys):
    path = _report.Report("speed").row(case="one", ms=[2.5]).write(tmp_path)
    assert capsys.readouterr().out == path.with_suffix(".md").read_text()


def test_the_command_is_relative_to_the_repository(monkeypatch):
    script = str(_report.ROOT / "bench" / "speed.py")
    monkeypatch.setattr(sys, "argv", [script, "--runs", "3", "two words"])
    assert _report.own_command() == "python bench/speed.py --runs 3 'two words'"


def test_the_file_names_the_benchmark_and_the_machine(tmp_path):
    path = _report.Report("speed").row(case="one", ms=[2.5]).write(tmp_path)
    assert path.name == f"speed-{_report.machine()}.json"
    assert _report.machine().replace("-", "").isalnum()
