"""``multigraft eval``, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import multigraft as mg
from multigraft import cli
from tests.merging.models import write_adapter
from tests.tiny_base import pair_rows, write_lines


@pytest.fixture(scope="module")
def adapters(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("adapters")
    config = mg.LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM")
    places = [write_adapter(root / n, base_dir, config, seed=len(n)) for n in ("ada", "boole")]
    return [word for place in places for word in ("-a", str(place))]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    def call(*words: str, code: int = 0) -> tuple[str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(["eval", *words])
        shown = capsys.readouterr()
        assert end.value.code == code, shown.err
        return shown.out, shown.err

    return call


@pytest.fixture
def data(tmp_path: Path) -> str:
    return str(write_lines(tmp_path / "held-out.jsonl", pair_rows()))


def test_a_table_with_a_row_each(run, adapters, data):
    out, _ = run(data, *adapters, "--max-new-tokens", "4")
    lines = [line.split() for line in out.splitlines() if line.strip()]
    assert lines[0] == ["adapter", "loss", "perplexity", "exact", "match"]
    assert [line[0] for line in lines[1:4]] == ["ada", "boole", "base"]
    assert "12 examples" in out


def test_json_has_everything(run, adapters, data):
    words = [data, *adapters, "--json", "--no-compare", "--no-answers", "--limit", "5"]
    found = json.loads(run(*words)[0])
    assert (found["examples"], found["task"], found["left_out"]) == (5, "causal-lm", 0)
    assert [score["speaker"] for score in found["scores"]] == ["ada", "boole"]
    assert all(score["exact_match"] is None and score["loss"] > 0 for score in found["scores"])


def test_bad_lines_are_fatal_or_left_out(run, adapters, tmp_path):
    data = str(write_lines(tmp_path / "d.jsonl", [*pair_rows(), "no"]))
    assert "d.jsonl" in run(data, *adapters, code=2)[1]
    words = [data, *adapters, "--on-bad-line", "skip", "--no-answers"]
    out, err = run(*words)
    assert "12 examples" in out and "left out" in err and "13" in err


def test_another_task_has_its_own_measures(run, base_dir, tmp_path):
    rows = [{"text": f"word {n}", "label": "odd" if n % 2 else "even"} for n in range(8)]
    data = str(write_lines(tmp_path / "d.jsonl", rows))
    words = [data, "--base", str(base_dir), "--task", "seq-cls", "--json"]
    (score,) = json.loads(run(*words)[0])["scores"]
    assert set(score["measures"]) == {"accuracy", "f1"} and score["perplexity"] is None
    task = '{"name": "seq-cls", "labels": ["odd", "even", "other"]}'
    assert json.loads(run(*words[:-2], task, "--json")[0])["task"] == "seq-cls"
    assert "Nearest: `seq-cls`" in run(*words[:-2], "seq-cl", code=2)[1]
    assert "no JSON" in run(*words[:-2], "{x", code=2)[1]


def test_a_mistake_is_one_line_and_exits_2(run, adapters, base_dir):
    _, err = run("absent.jsonl", *adapters, code=2)
    assert err.startswith("multigraft: ") and err.count("\n") == 1
    assert "Example" in run("--help")[0]
