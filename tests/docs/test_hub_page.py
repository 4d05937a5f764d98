"""docs/hub.md runs as written, against a hub of its own."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from multigraft import get_peft_model, hub
from tests.hub_stand_in import running, turn_to
from tests.integrations.small_trainer import base, config

PAGE = Path(__file__).resolve().parents[2] / "docs" / "hub.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(base(), config())
    model.add_adapter("sonnets", config())
    model.save_pretrained(tmp_path / "made")
    monkeypatch.chdir(tmp_path)
    with running() as stand_in:
        turn_to(stand_in, tmp_path / "cache", monkeypatch)
        monkeypatch.setenv("HF_TOKEN", stand_in.token)
        stand_in.add("me/poems", tmp_path / "made")
        names: dict[str, Any] = {"base": base()}
        for block in re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE):
            exec(compile(block, str(PAGE), "exec"), names)
        assert stand_in.repositories["me/verses"].is_private
        assert stand_in.repositories["me/verses"].messages[-1] == "Trained on sonnets"
        pushed = stand_in.files("me/verses")
        assert "sonnets/adapter_model.safetensors" in pushed
        assert "adapter_model.safetensors" not in stand_in.files("me/config-alone")


def test_every_option_is_listed_and_one_of_the_hubs() -> None:
    table = TEXT.split("| option | says |")[1].split("\n\n")[0]
    told = set(re.findall(r"`(\w+)`", table)) - {"main", "HF_HUB_CACHE", "hf_hub_download"}
    assert told == {*hub.OPTIONS, "subfolder"}
    assert told <= set(inspect.signature(huggingface_hub.hf_hub_download).parameters)
