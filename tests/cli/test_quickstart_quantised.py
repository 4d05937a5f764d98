"""`multigraft quickstart --quantize`: the same job on a base whose linear layers are packed."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from multigraft import PeftModel
from multigraft.cli import main
from multigraft.demo import TASKS, model_path
from multigraft.storage import storage_of
from multigraft.train import load_model


def quickstart(output: Path, *options: str) -> tuple[object, str]:
    shown = io.StringIO()
    with redirect_stdout(shown), pytest.raises(SystemExit) as end:
        main(["quickstart", "--output", str(output), "--quantize", "nf4", *options])
    return end.value.code, shown.getvalue()


def test_adapters_of_a_packed_base_stand_side_by_side_and_reload_equal(tmp_path):
    code, text = quickstart(tmp_path, "--steps", "2", "--heldout", "2")
    assert "one frozen base of 3,868,928 parameters, 3 adapters at 28 sites" in text
    assert "q_proj  Linear4bit 256×256, bnb4" in text
    assert "✓ 3 adapters stand side by side; none lies inside another" in text
    assert "✓ reloaded on a fresh base, the adapters give equal outputs" in text
    assert code == 1  # two steps teach nothing
    name = TASKS[0].name
    base = load_model(model_path(), quantize="nf4")
    model = PeftModel.from_pretrained(base, tmp_path / name, adapter_name=name)
    assert {storage_of(x.base_layer).name for x in model.base_model.layers()} == {"bnb4"}
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}


def test_an_unknown_format_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["quickstart", "--output", str(tmp_path / "out"), "--quantize", "q8"])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("multigraft: `quantize` (='q8') must be one of nf4")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_every_promise_holds_on_a_packed_base_after_enough_steps(tmp_path):
    code, text = quickstart(tmp_path, "--steps", "60", "--heldout", "20")
    assert code == 0, text
    assert "Every promise holds" in text
