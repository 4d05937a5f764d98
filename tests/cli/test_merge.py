"""``multigraft merge``, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import multigraft as mg
from multigraft import cli
from tests.merging.models import merged_in_memory, require_same, write_adapter


@pytest.fixture(scope="module")
def adapters(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    config = mg.LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM")
    return [write_adapter(root / n, base_dir, config, seed=len(n)) for n in ("ada", "boole")]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    def call(*words: object, code: int = 0) -> tuple[str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(["merge", *map(str, words)])
        shown = capsys.readouterr()
        assert end.value.code == code, shown.err
        return shown.out, shown.err

    return call


def test_it_says_what_it_did(run, adapters, base_dir, tmp_path):
    out, _ = run(adapters[0], "-o", tmp_path / "out")
    assert f"ada into {base_dir}: 14 layers, 14 of 14 tensors differ" in out
    assert "the same first choice at 100.0% of 32 places" in out
    require_same(tmp_path / "out", merged_in_memory(base_dir, adapters[0]))


def test_json_has_everything(run, adapters, base_dir, tmp_path):
    words = [*adapters, "-o", tmp_path / "out", "--base", base_dir, "--json"]
    found = json.loads(run(*words, "--prompt", "Input: 1")[0])
    assert (found["adapters"], found["layers"]) == (["ada", "boole"], 14)
    assert found["verdict"]["is_good"] and found["verdict"]["change"] > 1
    unchecked = json.loads(run(*words, "--check", "off", "--overwrite")[0])
    assert unchecked["verdict"] is None and not unchecked["is_checked"]


MISTAKES = {
    "there already": (["{a}", "-o", "{a}"], "exists"),
    "no base": (["{a}", "-o", "{out}", "--base", "./no-such"], "no such directory"),
    "an adapter as base": (["{a}", "-o", "{out}", "--base", "{b}"], "an adapter, not a base model"),
    "no adapter": (["{base}", "-o", "{out}"], "no adapter was named"),
    "no such check": (["{a}", "-o", "{out}", "--check", "some"], "must be one of logits, off"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exits_2(run, adapters, base_dir, tmp_path, mistake):
    words, says = MISTAKES[mistake]
    places = {"a": adapters[0], "b": adapters[1], "base": base_dir, "out": tmp_path / "out"}
    _, err = run(*(word.format(**places) for word in words), code=2)
    assert err.startswith("multigraft: ") and err.count("\n") == 1 and says in err
    assert not (tmp_path / "out").exists()


def test_ctrl_c_leaves_nothing(run, adapters, tmp_path, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("multigraft.merging.stream.unmerge_layer", interrupted)
    _, err = run(adapters[0], "-o", tmp_path / "out", code=130)
    assert err == "multigraft: interrupted; nothing was saved.\n"
    assert list(tmp_path.iterdir()) == []


def test_help_has_an_example(run):
    assert "Example" in run("--help")[0]
