"""``multigraft diff``: exit codes like diff's, a table, JSON."""

from __future__ import annotations

import json
import shutil

import pytest

from multigraft import IA3Config, cli
from tests.inspection.adapters import write


@pytest.fixture
def run(capsys):
    def call(*arguments: object) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(["diff", *map(str, arguments)])
        shown = capsys.readouterr()
        return end.value.code, shown.out, shown.err

    return call


def test_the_same_is_zero(run, tmp_path):
    a = write(tmp_path / "a")
    shutil.copytree(a, tmp_path / "b")
    code, out, err = run(a, tmp_path / "b")
    assert (code, err) == (0, "")
    assert out == f"{a} and {tmp_path / 'b'} are the same\n"


def test_a_difference_is_one_and_a_table(run, tmp_path):
    a, b = write(tmp_path / "a"), write(tmp_path / "b", seed=2, lora_alpha=3)
    code, out, _ = run(a, b)
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert code == 1
    assert "lora_alpha 8 3" in lines
    assert "tensors: 12 differ, 0 are the same" in lines
    assert "changes: 6 of 6 sites differ" in lines
    assert any(line.startswith("~ layers.{0..2}.up.lora_A.weight ×3 float32 4×8") for line in lines)


def test_json_holds_every_figure(run, tmp_path):
    code, out, _ = run(write(tmp_path / "a"), write(tmp_path / "b", seed=2), "--json")
    found = json.loads(out)
    assert code == 1
    assert not found["is_same"]
    assert len(found["tensors"]) == 12
    assert {"path", "first", "second", "distance", "cosine"} == set(found["changes"][0])


@pytest.mark.parametrize("arguments", [("a", "nowhere"), ("a", "a", "--base", "./nowhere")])
def test_a_mistake_is_two_and_one_line(run, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a")
    (tmp_path / "nowhere").mkdir()
    shutil.rmtree(tmp_path / "nowhere") if "--base" in arguments else None
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("multigraft: ")
    assert len(err.splitlines()) == 1


def test_a_methods_change_is_read_on_the_base_that_is_given(run, tmp_path, base_dir):
    import torch
    from transformers import AutoModelForCausalLM

    from multigraft import get_peft_model

    folders = []
    for seed in (1, 2):
        base = AutoModelForCausalLM.from_pretrained(base_dir, dtype="float32")
        config = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
        model = get_peft_model(base, config)
        torch.manual_seed(seed)
        for parameter in model.roster.parameters("default"):
            torch.nn.init.normal_(parameter)
        model.save_pretrained(tmp_path / str(seed))
        folders.append(tmp_path / str(seed))
    _, alone, _ = run(*folders)
    code, on_base, _ = run(*folders, "--base", base_dir)
    assert code == 1
    assert "IA3's change needs the base's weights" in alone
    assert "changes: 2 of 2 sites differ" in on_base
