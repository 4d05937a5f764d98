"""docs/exchange.md: its Python and its commands run as written, from top to bottom."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from multigraft import cli
from multigraft.exchange import CONSUMERS, FORMATS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "exchange.md"


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    text = PAGE.read_text(encoding="utf-8")
    for kind, block in re.findall(r"^```(python|console)\n(.*?)^```", text, re.S | re.M):
        if kind == "python":
            exec(compile(block, str(PAGE), "exec"), names)
            continue
        for line in block.splitlines():
            try:
                code = cli.main(shlex.split(line.removeprefix("$ "))[1:])
            except SystemExit as end:
                code = end.code
            assert not code, line
    assert (tmp_path / "for-sglang" / "adapter_config.json").is_file()
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()


def test_the_page_names_every_program_and_format():
    text = PAGE.read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in text for name in [*CONSUMERS, *FORMATS])
