"""T4: a combination does what its sources do together, and a call that cannot says so.

PEFT 0.21.2: rsLoRA is too strong by the root of the rank, DoRA's magnitudes and saved modules are
dropped, and an existing name makes the call return in silence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import multigraft
from multigraft import AdapterNameError, LoraConfig
from tests.bases.attentions import X, adapted, encoder
from tests.oracle import bert_classifier, build, inputs, output, quiet, random_state

SOURCES: dict[str, dict[str, Any]] = {
    "rs": {"use_rslora": True, "r": 4, "target_modules": "all-linear"},
    "dora": {"use_dora": True, "r": 2, "target_modules": ["query", "value"]},
    "plain": {"r": 3, "target_modules": ["key"], "bias": "lora_only"},
}


def classifier() -> Any:
    """A classifier with three adapters of different kinds, each with a head of its own."""
    model: Any = None
    for seed, (name, options) in enumerate(SOURCES.items()):
        config = LoraConfig(task_type="SEQ_CLS", **options)
        if model is None:
            model = multigraft.get_peft_model(build(bert_classifier), config, name)
        else:
            model.add_adapter(name, config)
        state = multigraft.get_peft_model_state_dict(model, adapter_name=name)
        own = {k: v for k, v in random_state(state, seed, 0.1).items() if "magnitude" not in k}
        multigraft.set_peft_model_state_dict(model, state | own, name)
    return model.eval()


def outputs(model: Any, adapter: str) -> Tensor:
    model.set_adapter(adapter)
    return output(model, inputs(model)).detach()


@pytest.mark.parametrize("rule", ["cat", "svd"])
@pytest.mark.parametrize("which", SOURCES)
def test_the_others_at_weight_zero_leave_one_adapter(which: str, rule: str) -> None:
    model = classifier()
    weights = [float(name == which) for name in SOURCES]
    model.add_weighted_adapter(list(SOURCES), weights, "sum", rule, **_enough(rule))
    torch.testing.assert_close(outputs(model, "sum"), outputs(model, which), atol=1e-5, rtol=1e-4)


def _enough(rule: str) -> dict[str, int]:
    return {"svd_rank": 9} if rule == "svd" else {}


def test_either_library_loads_what_is_saved(tmp_path: Path) -> None:
    model = classifier()
    model.add_weighted_adapter(list(SOURCES), [0.5, 0.4, -0.2], "sum", "svd", svd_rank=5)
    expected = outputs(model, "sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    with quiet():
        there = peft.PeftModel.from_pretrained(build(bert_classifier), tmp_path / "sum").eval()
    here = multigraft.PeftModel.from_pretrained(build(bert_classifier), tmp_path / "sum").eval()
    for loaded in (there, here):
        found = output(loaded, inputs(loaded)).detach()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_merging_a_combination_is_the_combination() -> None:
    model = classifier()
    model.add_weighted_adapter(list(SOURCES), [0.5, 0.4, -0.2], "sum", "cat")
    expected = outputs(model, "sum")
    merged = model.merge_and_unload(adapter_names=["sum"])
    torch.testing.assert_close(output(merged, inputs(merged)), expected, atol=1e-5, rtol=1e-4)


def test_a_name_that_is_taken_is_refused() -> None:
    model = classifier()
    with pytest.raises(AdapterNameError, match="adapter `dora` exists"):
        model.add_weighted_adapter(["rs", "plain"], [1.0, 1.0], "dora", "cat")


def test_what_bypasses_layers_sees_a_combination_too() -> None:
    """T6: the encoder's fast path in evaluation; the tensors in training."""
    model = adapted(encoder, ["linear1", "linear2"])
    name = model.active_adapters[0]
    expected = model.eval()(X).detach()
    model.add_weighted_adapter([name], [1.0], "sum", "cat")
    model.set_adapter("sum")
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(X), expected)
        torch.testing.assert_close(model.train()(X), expected)
