"""Adapters under a directory, told by their configs and headers."""

from __future__ import annotations

import json
import os
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch
from torch import nn

import multigraft as mg
from multigraft import cli
from multigraft.errors import CheckpointError
from multigraft.inspection.listing import hub_cache, list_adapters


class Net(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)


def write(folder: Path, config: mg.PeftConfig) -> Path:
    mg.get_peft_model(Net(), config).save_pretrained(folder)
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    lora = mg.LoraConfig(
        target_modules=["up", "down"],
        r=4,
        rank_pattern={"down": 2},
        base_model_name_or_path="some/base",
        task_type="CAUSAL_LM",
    )
    write(tmp_path / "runs" / "b", lora)
    write(tmp_path / "a", mg.IA3Config(target_modules=["up"], feedforward_modules=[]))
    write(tmp_path / ".hidden", lora)
    return tmp_path


def test_each_is_told_with_what_its_files_say(root: Path):
    os.utime(root / "runs" / "b" / "adapter_model.safetensors", (10**9, 10**9))
    first, second = list_adapters(root)
    assert (first.name, first.method, first.rank, first.base) == ("a", "IA3", None, "")
    assert first.parameters == 16
    assert (second.name, second.method, second.rank) == ("runs/b", "LORA", (2, 4))
    assert (second.base, second.task) == ("some/base", "CAUSAL_LM")
    assert second.parameters == 4 * (8 + 16) + 2 * (16 + 8)
    assert second.bytes == (root / "runs/b/adapter_model.safetensors").stat().st_size
    assert second.saved == datetime.fromtimestamp(10**9, tz=timezone.utc)


def test_no_tensor_is_read(root: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    monkeypatch.setattr("multigraft.reading.load_file", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    (root / "old").mkdir()
    (root / "old" / "adapter_config.json").write_bytes(
        (root / "a/adapter_config.json").read_bytes()
    )
    (root / "old" / "adapter_model.bin").write_bytes(b"anything")
    assert [(each.name, each.parameters) for each in list_adapters(root)][1] == ("old", None)


def test_damaged_ones_are_told_beside_the_others(root: Path):
    (root / "a" / "adapter_model.safetensors").write_bytes(b"short")
    for name, text in {
        "none": '{"peft_type": "LORA"}',
        "odd": "{",
        "new": '{"peft_type": "X"}',
    }.items():
        (root / name).mkdir()
        (root / name / "adapter_config.json").write_text(text)
    found = {each.name: each for each in list_adapters(root)}
    assert "fewer than the 8" in found["a"].problem
    assert "no weights" in found["none"].problem and found["none"].method == "LORA"
    assert "not valid JSON" in found["odd"].problem
    assert "X" in found["new"].problem
    assert found["runs/b"].problem == ""


def test_the_hubs_cache_gives_ids(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cache = tmp_path / "cache"
    place = cache / "models--ada--poems" / "snapshots" / ("0123456789" * 4) / "sub"
    write(place, mg.LoraConfig(target_modules=["up"]))
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    assert [each.name for each in list_adapters(hub_cache())] == ["ada/poems@01234567/sub"]
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert hub_cache() == tmp_path / "home" / "hub"


def test_a_directory_that_is_an_adapter_is_called_by_its_name(root: Path):
    assert [each.name for each in list_adapters(root / "a")] == ["a"]
    with pytest.raises(CheckpointError, match="no such directory"):
        list_adapters(root / "absent")


def test_the_command(root: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    pytest.importorskip("typer")

    def run(*words: str, code: int = 0) -> str:
        with pytest.raises(SystemExit) as end:
            cli.main(["list", *words])
        shown = capsys.readouterr()
        assert end.value.code == code, shown.err
        return shown.out + shown.err

    lines = run(str(root)).splitlines()
    assert lines[0].split() == [
        "name",
        "method",
        "rank",
        "task",
        "base",
        "parameters",
        "size",
        "saved",
    ]
    assert lines[2].split()[:6] == ["runs/b", "LORA", "2-4", "CAUSAL_LM", "some/base", "144"]
    found = json.loads(run(str(root), "--json"))
    assert [each["name"] for each in found] == ["a", "runs/b"] and found[1]["rank"] == [2, 4]
    monkeypatch.chdir(root / "runs")
    assert "LORA" in run()
    (root / "a" / "adapter_model.safetensors").unlink()
    assert "IA3 (damaged)" in run(str(root), code=1)
    empty = root / "empty"
    empty.mkdir()
    assert "no adapter lies under" in run(str(empty))
    assert "no such directory" in run(str(root / "x"), code=2)
    assert "in place of a directory" in run("x", "--hub", code=2)
    assert "Example" in run("--help")
