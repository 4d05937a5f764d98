"""docs/serving.md: its Python runs from top to bottom, and does what the text says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import multigraft
from multigraft import LoraConfig, get_peft_model
from multigraft.slots import Slotted
from tests.oracle import build, inputs, llama, random_state

PAGE = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)
ADAPTERS = {"support": {"r": 4}, "legal": {"r": 8}, "poems": {"r": 2}, "tone": {"r": 16}}


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the page's Python leaves behind."""
    root = tmp_path_factory.mktemp("serving")
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        config = LoraConfig(target_modules=["q_proj", "down_proj"], lora_alpha=seed + 1, **options)
        model = get_peft_model(build(llama), config)
        state = random_state(multigraft.get_peft_model_state_dict(model), seed)
        multigraft.set_peft_model_state_dict(model, state)
        model.save_pretrained(root / "adapters" / name)
    base = build(llama)
    found: dict[str, Any] = {"base": base, "batch": inputs(base)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        torch._dynamo.reset()
        for block in BLOCKS:
            exec(compile(block, str(PAGE), "exec"), found)
    found["root"] = root
    return found


def alone(names: dict[str, Any], adapter: str) -> torch.Tensor:
    model = multigraft.PeftModel.from_pretrained(build(llama), names["root"] / "adapters" / adapter)
    with torch.no_grad():
        return model.eval()(**names["batch"]).logits


def test_every_block_runs(names: dict[str, Any]):
    assert len(BLOCKS) == 10
    assert list(names["model"].peft_config) == [
        *("support", "legal", "poems", "tone", "spare"),
        *(f"slot-{n}" for n in range(4)),
    ]


def test_a_library_serves_rows_by_name(names: dict[str, Any]):
    for row, adapter in enumerate(("legal", "poems")):
        torch.testing.assert_close(names["served"][row], alone(names, adapter)[row])
    assert names["library"].counts.swapped == 2


def test_rows_are_their_adapters(names: dict[str, Any]):
    assert names["tokens"].shape == (3, names["batch"]["input_ids"].shape[1] + 4)
    torch.testing.assert_close(names["logits"][0], alone(names, "support")[0])
    torch.testing.assert_close(names["logits"][2], names["plain"][2])
    assert (names["logits"][1] - names["plain"][1]).abs().max() > 1e-3


def test_swaps_put_the_last_adapter_in_place(names: dict[str, Any]):
    model = names["model"]
    grafts = [graft for _, graft in model.roster.grafts("support")]
    assert all(isinstance(g.method, Slotted) and g.method.most == 16 for g in grafts)
    for name, swapped in (("support", "tone"), ("spare", "poems")):
        model.set_adapter(name)
        with torch.no_grad():
            torch.testing.assert_close(model(**names["batch"]).logits, alone(names, swapped))


def test_everything_is_back_from_the_cpu(names: dict[str, Any]):
    assert names["model"].roster.residency is None
