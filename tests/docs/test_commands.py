"""docs/commands.md: its commands run as written, and each verb has its section."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest

import multigraft as mg
from multigraft.demo import model_path
from multigraft.generation.conversation import COMMANDS
from tests.docs import page
from tests.merging.models import write_adapter
from tests.tiny_base import pair_rows, write_lines

PAGE = "commands.md"
PIPED = re.compile(r"^\$ printf '(.*)' \| (multigraft .*)$")


@pytest.fixture
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the demo's base, two adapters of it, and data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MODEL").symlink_to(model_path(), target_is_directory=True)
    config = mg.LoraConfig(target_modules="all-linear", r=8, task_type="CAUSAL_LM")
    for seed, name in enumerate(["dates", "records"]):
        write_adapter(Path(name), Path("MODEL"), config, seed=seed)
    write_lines(tmp_path / "heldout.jsonl", pair_rows()[:4])
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": "the first of May"}])
    return tmp_path


def test_the_commands_run(somewhere: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    lines = [
        line for kind, text in page.blocks(PAGE) if kind == "console" for line in text.splitlines()
    ]
    for line in lines:
        piped = PIPED.match(line)
        if piped:
            monkeypatch.setattr("sys.stdin", io.StringIO(piped[1].replace("\\n", "\n")))
            line = f"$ {piped[2]} --max-new-tokens 4"
        elif " generate " in line or " eval " in line:
            line = f"{line} --max-new-tokens 4"
        capsys.readouterr()
        assert not page.command(line), line
        shown = capsys.readouterr().out
        if "--json" in line:
            assert all(json.loads(each) for each in shown.splitlines())
    assert (somewhere / "merged" / "model.safetensors").is_file()
    assert (somewhere / "both" / "adapter_model.safetensors").is_file()


def test_each_verb_and_each_command_is_there():
    text = (page.DOCS / PAGE).read_text(encoding="utf-8")
    for verb in ("generate", "chat", "eval", "merge", "combine", "list", "convert"):
        assert f"\n## {verb}\n" in text
    for command in COMMANDS:
        assert f"`{command}" in text or f", `{command}" in text
