"""``multigraft report``: a page from the shell, and one line for each mistake."""

from __future__ import annotations

import pytest
import torch

from multigraft import LoraConfig, cli, get_peft_model
from multigraft.train import load_base
from tests.inspection.adapters import write


@pytest.fixture
def run(capsys):
    def call(*arguments: object) -> tuple[object, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main(["report", *map(str, arguments)])
        shown = capsys.readouterr()
        return end.value.code, shown.out, shown.err

    return call


def test_it_writes_a_page_and_says_what_is_in_it(run, tmp_path):
    page = tmp_path / "page.html"
    code, out, err = run(write(tmp_path / "a"), write(tmp_path / "b", seed=2), "-o", page)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("a: LORA at 6 sites, ‖ΔW‖ ")
    assert lines[2] == f"written: {page}"
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_beside_a_base_norms_are_relative(run, base_dir, tmp_path):
    model = get_peft_model(
        load_base(base_dir, dtype="float32"), LoraConfig(r=2, target_modules=["q_proj"])
    )
    for parameter in model.roster.parameters("default"):
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "a")
    code, out, _ = run(tmp_path / "a", "--base", base_dir, "-o", tmp_path / "page.html")
    assert code == 0
    assert "% of the weights'" in out
    assert "Intruder dimensions" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/nowhere"], "holds no adapter_config.json"),
        (["{tmp}/a", "--base", "./nowhere"], "there is no such directory"),
        (["{tmp}/a", "-o", "{tmp}/file/page.html"], "file"),
        (["{tmp}/a", "--base", "{base}"], "no module is called"),
    ],
)
def test_a_mistake_is_one_line_and_no_page(
    run, base_dir, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a")
    (tmp_path / "file").write_text("")
    code, out, err = run(*(each.format(tmp=tmp_path, base=base_dir) for each in arguments))
    assert (code, out) == (2, "")
    assert err.startswith("multigraft: ")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.glob("**/*.html"))
