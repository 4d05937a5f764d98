"""docs/with-transformers.md: its Python runs from top to bottom, and does what the text says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from multigraft.integrations import transformers as registration
from tests.integrations.small_trainer import Rows, base

PAGE = Path(__file__).resolve().parents[2] / "docs" / "with-transformers.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the page's Python leaves behind."""
    found: dict[str, Any] = {"base": base(), "dataset": Rows()}
    found["root"] = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(found["root"])
        for block in BLOCKS:
            exec(compile(block, str(PAGE), "exec"), found)
    return found


def test_every_block_runs(names: dict[str, Any]):
    assert len(BLOCKS) == 4
    assert registration.is_registered()


def test_checkpoints_and_the_saved_adapter_hold_no_base(names: dict[str, Any]):
    folders = [*(names["root"] / "run").iterdir(), names["root"] / "adapter"]
    assert len(folders) == 3
    for folder in folders:
        assert (folder / "adapter_model.safetensors").is_file()
        assert not (folder / "model.safetensors").exists()


def test_the_model_stays_of_its_class(names: dict[str, Any]):
    assert type(names["plain"]).__name__ == "LlamaForCausalLM"
    assert list(names["opened"].peft_config) == ["default", "again"]
