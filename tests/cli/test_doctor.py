"""``multigraft doctor``: what it prints, its exit codes, and a base without its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from multigraft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, cli, get_peft_model
from multigraft.train import load_skeleton
from tests.diagnosis.files import (
    CONFIG,
    SETTINGS,
    WEIGHTS,
    into_memory,
    rename,
    resettle,
    rewrite,
    write,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "adapter", CONFIG)


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(["doctor", *map(str, arguments)])
    assert isinstance(end.value.code, int)
    return end.value.code


def test_good_files_are_one_line_and_exit_0(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert run(folder) == 0
    assert capsys.readouterr().out == f"{folder}: no findings, no notes\n"


def test_a_finding_is_printed_with_its_remedy_and_exits_1(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    resettle(folder, r=4)
    assert run(folder) == 1
    shown = capsys.readouterr().out
    assert "1 finding, no notes" in shown
    assert "ranks at blocks.0.up" in shown or "ranks at conv" in shown
    assert "has rank 2 and the config means 4, at 4 sites" in shown


def test_what_is_mended_is_said_and_exits_0(folder: Path, capsys: pytest.CaptureFixture[str]):
    rename(folder, into_memory)
    assert run(folder) == 1
    assert run(folder, "--fix") == 0
    shown = capsys.readouterr().out
    assert "done: renamed 6 tensors" in shown
    assert f"{WEIGHTS}.bak" in shown


def test_all_of_it_comes_as_json(folder: Path, capsys: pytest.CaptureFixture[str]):
    resettle(folder, r=4)
    assert run(folder, "--json") == 1
    given = json.loads(capsys.readouterr().out)
    assert given["findings"][0]["check"] == "ranks"


@pytest.mark.parametrize(
    "arguments",
    [["nowhere/at/all"], ["{folder}", "--base", "nowhere/at/all"]],
    ids=["no adapter", "no base"],
)
def test_a_mistake_is_one_line_and_exits_2(
    arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(*(each.format(folder=folder) for each in arguments)) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("multigraft: ")
    assert "nowhere/at/all" in shown.err
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize("data", [b"", b"text", (1 << 62).to_bytes(8, "little")])
def test_a_hostile_file_is_a_finding_and_no_traceback(
    data: bytes, folder: Path, capsys: pytest.CaptureFixture[str]
):
    (folder / WEIGHTS).write_bytes(data)
    (folder / SETTINGS).write_bytes(b"[" * 100_000)
    assert run(folder) == 1
    shown = capsys.readouterr()
    assert shown.out.count("unreadable file at") == 2
    assert shown.err == ""


def test_a_pickle_needs_the_words(folder: Path, capsys: pytest.CaptureFixture[str]):
    torch.save({}, folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    assert run(folder) == 1
    assert "--allow-pickle --fix" in capsys.readouterr().out
    run(folder, "--allow-pickle")
    assert "can run code" not in capsys.readouterr().out


# A base of which the config alone is there.


@pytest.fixture
def skeleton(base_dir: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    shutil.copy(base_dir / "config.json", folder)
    return folder


CONFIGS = {
    "lora": LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    "usual targets": LoraConfig(r=2),
    "prompt": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("which", CONFIGS)
def test_a_base_is_built_from_its_config_without_weights(
    which: str, skeleton: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    base = load_skeleton(skeleton).to_empty(device="cpu")
    get_peft_model(base, CONFIGS[which]).save_pretrained(tmp_path / "adapter")
    rewrite(tmp_path / "adapter", lambda held: {k: torch.ones_like(t) for k, t in held.items()})
    assert run(tmp_path / "adapter", "--base", skeleton) == 0, capsys.readouterr().out
    rewrite(tmp_path / "adapter", lambda held: {k: t[:-1].clone() for k, t in held.items()})
    assert run(tmp_path / "adapter", "--base", skeleton) == 1
    assert "and the base needs" in capsys.readouterr().out
