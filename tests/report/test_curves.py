"""Logs beside an adapter, whoever wrote them, and however damaged they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from multigraft.report import read_curves
from multigraft.report.curves import POINTS


def write(folder: Path, rows: list, name: str = "train_log.jsonl") -> None:
    text = "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    (folder / name).write_text(text)


def test_a_runs_log_is_a_curve(tmp_path):
    write(tmp_path, [{"step": n, "loss": 3 / n, "adapter": "dates"} for n in (2, 1, 3)])
    (curve,) = read_curves(tmp_path, "folder")
    assert (curve.adapter, curve.each) == ("dates", 1)
    assert curve.points == ((1, 3.0), (2, 1.5), (3, 1.0))


def test_several_adapters_in_one_log_are_curves_of_their_own(tmp_path):
    write(tmp_path, [{"step": 1, "loss": 2, "adapter": n} for n in "ab"])
    assert [curve.adapter for curve in read_curves(tmp_path, "folder")] == ["a", "b"]


def test_the_trainers_own_log_is_read_where_there_is_no_other(tmp_path):
    history = [{"step": 10, "loss": 2.5}, {"step": 10, "eval_loss": 2.0}, {"step": 20, "loss": 1.5}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    curve, held_out = read_curves(tmp_path, "folder")
    assert (curve.adapter, curve.points) == ("folder", ((10, 2.5), (20, 1.5)))
    assert (held_out.adapter, held_out.points) == ("folder, held out", ((10, 2.0),))


def test_a_long_log_is_averaged(tmp_path):
    write(tmp_path, [{"step": n, "loss": n % 2} for n in range(1, 10 * POINTS + 1)])
    (curve,) = read_curves(tmp_path, "a")
    assert len(curve.points) == POINTS
    assert curve.each == 10
    assert {loss for _, loss in curve.points} == {0.5}


@pytest.mark.parametrize(
    "row",
    [
        "{",
        '{"step": 1, "loss": NaN}',
        '{"step": 1, "loss": Infinity}',
        "[" * 3000,
        {"step": "1", "loss": 2},
        {"step": True, "loss": 2},
        {"loss": 2},
        [1, 2],
        None,
        {"step": 10**40, "loss": 1},
    ],
    ids=lambda row: str(row)[:20],
)
def test_rows_that_are_none_are_passed_over(tmp_path, row):
    write(tmp_path, [row, {"step": 1, "loss": 2.0, "adapter": ["no", "name"]}])
    (curve,) = read_curves(tmp_path, "a")
    assert (curve.adapter, curve.points) == ("a", ((1, 2.0),))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"log_history": 3}', "\x00\xff"], ids=repr)
def test_no_log_at_all_is_no_curve(tmp_path, text):
    (tmp_path / "trainer_state.json").write_text(text)
    assert read_curves(tmp_path, "a") == []
    assert read_curves(tmp_path / "nowhere", "a") == []
