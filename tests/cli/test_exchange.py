"""``multigraft export`` and ``multigraft convert``: what they print, exit codes, no tracebacks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from multigraft import cli
from tests.exchange.adapters import write
from tests.exchange.test_convert import golden_kohya


def run(*arguments: object) -> int:
    try:
        code = cli.main(list(map(str, arguments)))
    except SystemExit as end:
        code = end.code
    return int(code or 0)


def test_export_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = write(tmp_path / "a", alpha_pattern={"v_proj": 16})
    assert run("export", folder, "--for", "vllm", "-o", tmp_path / "b") == 0
    shown = capsys.readouterr().out
    assert "done: folded the scales of 1 of 4 layers into B, exactly" in shown
    assert f"written to {tmp_path / 'b'}: adapter_config.json, adapter_model.safetensors" in shown


def test_export_gives_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert (
        run("export", write(tmp_path / "a"), "--for", "vllm", "-o", tmp_path / "b", "--json") == 0
    )
    assert json.loads(capsys.readouterr().out)["target"] == str(tmp_path / "b")


def test_convert_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    golden_kohya(tmp_path / "k.safetensors")
    assert run("convert", tmp_path / "k.safetensors", "--to", "peft", "-o", tmp_path / "p") == 0
    shown = capsys.readouterr().out
    assert "done: kohya to peft: 5 pairs of `text_encoder`, `text_encoder_2`, `unet`" in shown


MISTAKES = {
    "no adapter": ("export", "{0}/none", "--for", "vllm", "-o", "{0}/b"),
    "no such program": ("export", "{0}/a", "--for", "tgi", "-o", "{0}/b"),
    "no file": ("convert", "{0}/none", "--to", "peft", "-o", "{0}/b"),
    "no such format": ("convert", "{0}/a", "--to", "onnx", "-o", "{0}/b"),
    "which model": ("convert", "{0}/a", "--to", "kohya", "-o", "{0}/b.safetensors"),
    "no LoRA": ("convert", "{0}/a/adapter_config.json", "--to", "peft", "-o", "{0}/b"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exits_2(
    mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write(tmp_path / "a")
    assert run(*(each.format(tmp_path) for each in MISTAKES[mistake])) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("multigraft: ") and shown.err.count("\n") == 1
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("verb", ["export", "convert"])
def test_help_has_an_example(verb: str, capsys: pytest.CaptureFixture[str]):
    assert run(verb, "--help") == 0
    assert "Example" in capsys.readouterr().out
