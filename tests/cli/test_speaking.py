"""What `chat` and `list` draw in a terminal."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

import multigraft as mg
from multigraft import cli
from multigraft.cli.speaking import SideBySide
from tests.merging.models import write_adapter


@pytest.fixture(scope="module")
def adapters(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    config = mg.LoraConfig(target_modules=["q_proj"], r=4, task_type="CAUSAL_LM")
    for seed, name in enumerate(["ada", "boole"]):
        write_adapter(root / name, base_dir, config, seed=seed)
    return root


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """The output of a command, as a terminal of 100 columns gets it."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")

    def call(*words: str, code: int = 0, stdin: str = "") -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as end:
            cli.main(list(words))
        shown = capsys.readouterr()
        assert end.value.code == code, shown.err
        return shown.out

    return call


def test_columns_grow_side_by_side():
    console = Console(force_terminal=True, width=80, file=io.StringIO(), color_system=None)
    with SideBySide(console, ["ada", "__base__"]) as columns:
        columns.add(1, "one [bold]")
        columns.add(0, "two")
        columns.add(1, " three")
    drawn = console.file.getvalue()
    last = drawn[drawn.rindex("╭─") - 60 :].splitlines()
    assert any("ada" in line and "base" in line for line in last)
    assert any("two" in line and "one [bold] three" in line for line in last)


def test_several_speakers_answer_in_columns(run, adapters):
    words = ["chat", "-a", str(adapters), "--max-new-tokens", "3", "--temperature", "0"]
    out = run(*words, stdin="one\n/adapter ada\ntwo\n")
    assert any("ada" in line and "boole" in line and "╭" in line for line in out.splitlines())
    assert "ada>" in out and "answering: ada" in out


def test_the_list_is_a_table(run, adapters):
    out = run("list", str(adapters))
    assert "ada" in out and "boole" in out and "LORA" in out
    (adapters / "ada" / "adapter_model.safetensors").rename(adapters / "elsewhere")
    assert "(damaged)" in run("list", str(adapters), code=1)
    (adapters / "elsewhere").rename(adapters / "ada" / "adapter_model.safetensors")
