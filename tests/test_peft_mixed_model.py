"""`PeftMixedModel`: adapters of different methods active together, as PEFT's, and saved too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import multigraft
from multigraft import PeftMixedModel, PeftModel
from tests.laws import fingerprint
from tests.oracle import (
    Pair,
    bert_classifier,
    build,
    inputs,
    llama,
    our_config,
    output,
    peft_config,
    quiet,
)

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "LoraConfig", "r": 2},
    "loha": {"kind": "LoHaConfig", "r": 2},
    "lokr": {"kind": "LoKrConfig", "r": 2},
    "adalora": {"kind": "AdaLoraConfig", "total_step": 9},
    "oft": {"kind": "OFTConfig", "oft_block_size": 4},
}
TARGETS = ["q_proj", "down_proj"]


def mixed(names: list[str]) -> Pair:
    """Both libraries' models with these methods, alike and all active."""
    first, *more = names
    options = {name: {**METHODS[name], "target_modules": TARGETS} for name in names}
    ours = multigraft.get_peft_model(build(llama), our_config(options[first]), first, mixed=True)
    with quiet():
        theirs = peft.get_peft_model(build(llama), peft_config(options[first]), first, mixed=True)
    for name in more:
        ours.add_adapter(name, our_config(options[name]))
        theirs.add_adapter(name, peft_config(options[name]))
    ours.set_adapter(names)
    theirs.set_adapter(names)
    source = torch.Generator().manual_seed(0)
    held = {key.replace(".base_layer", ""): p for key, p in theirs.named_parameters()}
    with torch.no_grad():
        for key, parameter in ours.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=source) * 0.3)
                held[key.replace(".base_layer", "")].copy_(parameter)
    return Pair(ours.eval(), theirs.eval(), inputs(ours))


COMPANIES = [
    ["lora", "loha", "lokr"],
    ["lora", "adalora"],
    ["oft", "lora"],
    ["loha", "lora", "adalora", "lokr"],
]


@pytest.mark.parametrize("names", COMPANIES, ids="-".join)
def test_methods_act_together_as_in_peft(names: list[str]):
    pair = mixed(names)
    both = pair.assert_equal()
    pair.ours.set_adapter(names[0])
    assert (output(pair.ours, pair.batch) - both).abs().max() > 1e-3


def test_order_is_all_the_same():
    pair = mixed(["lora", "oft"])
    first = output(pair.ours, pair.batch)
    pair.ours.set_adapter(["oft", "lora"])
    torch.testing.assert_close(output(pair.ours, pair.batch), first)


@pytest.mark.parametrize("names", [["lora", "loha"], ["lora", "oft", "adalora"]], ids="-".join)
def test_methods_merge_together(names: list[str]):
    model = mixed(names).ours
    before = output(model, inputs(model))
    merged = model.merge_and_unload()
    torch.testing.assert_close(output(merged, inputs(merged)), before, atol=1e-5, rtol=1e-5)


def test_every_method_is_saved_and_loaded(tmp_path: Path):
    pair = mixed(["lora", "loha"])
    pair.ours.save_pretrained(tmp_path)
    model = PeftMixedModel.from_pretrained(build(llama), tmp_path / "lora", "lora")
    assert type(model) is PeftMixedModel
    model.load_adapter(tmp_path / "loha", "loha")
    model.set_adapter(["lora", "loha"])
    assert torch.equal(output(model.eval(), pair.batch), output(pair.ours, pair.batch))


def test_rows_of_one_batch_have_methods_of_their_own():
    pair = mixed(["lora", "loha"])
    alone = []
    for name in ("lora", "loha"):
        pair.ours.set_adapter(name)
        alone.append(output(pair.ours, pair.batch))
    y = output(pair.ours, pair.batch, adapter_names=["lora", "loha", "lora"])
    torch.testing.assert_close(y, torch.stack([alone[0][0], alone[1][1], alone[0][2]]))


def test_deleting_them_gives_the_base_back():
    base = build(llama)
    before = fingerprint(base)
    model = multigraft.get_peft_model(base, our_config({"target_modules": TARGETS}), mixed=True)
    model.add_adapter("b", our_config({**METHODS["loha"], "target_modules": TARGETS}))
    for name in ("default", "b"):
        model.delete_adapter(name)
    assert fingerprint(base) == before


def test_a_tasks_heads_are_saved_with_each_adapter():
    config = {"target_modules": ["query"], "task_type": "SEQ_CLS"}
    model = multigraft.get_peft_model(build(bert_classifier), our_config(config), mixed=True)
    assert model.peft_config["default"].modules_to_save[0] == "classifier"
    assert isinstance(model, PeftModel)
