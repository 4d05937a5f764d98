"""T19: replicated layers are replicated once, and the base's own come back.

PEFT 0.21.2 replicates again with every adapter: the first one's trained weights are replaced by
copies which its layers then share. It never gives the base back, and merges every replica's update
into the one weight that they share.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import multigraft
from multigraft import ConfigError, LoraConfig, PeftModel, StateError, TargetError, get_peft_model
from tests.laws import fingerprint
from tests.oracle import (
    bert_encoder,
    build,
    graft_pair,
    inputs,
    llama,
    output,
    peft_config,
    peft_state,
    quiet,
    random_state,
    t5,
)

DEEPER = {"target_modules": ["q_proj", "down_proj"], "layer_replication": [[0, 2], [1, 2]]}


def grafted(base: nn.Module | None = None, **more: Any) -> PeftModel:
    model = get_peft_model(base or build(llama), LoraConfig(**{**DEEPER, **more}))
    return filled(model)


def filled(model: PeftModel, adapter: str = "default", seed: int = 0) -> PeftModel:
    state = random_state(multigraft.get_peft_model_state_dict(model, adapter_name=adapter), seed)
    multigraft.set_peft_model_state_dict(model, state, adapter)
    return model.eval()


@pytest.mark.parametrize("maker", [llama, bert_encoder])
def test_replicas_have_adapters_of_their_own_as_in_peft(maker):
    targets = ["q_proj"] if maker is llama else ["query"]
    pair = graft_pair(maker, {**DEEPER, "target_modules": targets})
    ours = multigraft.get_peft_model_state_dict(pair.ours)
    assert ours.keys() == peft_state(pair.theirs).keys()
    assert len(ours) == 3 * 2
    pair.assert_equal()


def test_files_go_both_ways(tmp_path: Path):
    pair = graft_pair(llama, DEEPER)
    expected = pair.assert_equal()
    pair.ours.save_pretrained(tmp_path / "ours")
    with quiet():
        pair.theirs.save_pretrained(tmp_path / "theirs")
        theirs = peft.PeftModel.from_pretrained(build(llama), tmp_path / "ours")
    ours = PeftModel.from_pretrained(build(llama), tmp_path / "theirs")
    assert torch.equal(output(ours.eval(), pair.batch), output(pair.ours, pair.batch))
    torch.testing.assert_close(output(theirs.eval(), pair.batch), expected)


def test_a_second_adapter_neither_replicates_again_nor_changes_the_first():
    model = grafted()
    base = model.get_base_model()
    batch = inputs(model)
    first, layers = output(model, batch), base.model.layers
    before = multigraft.get_peft_model_state_dict(model)
    model.add_adapter("b", LoraConfig(**DEEPER))
    filled(model, "b", seed=1)
    assert base.model.layers is layers and len(layers) == 3
    assert torch.equal(output(model, batch), first)
    after = multigraft.get_peft_model_state_dict(model)
    assert all(torch.equal(before[key], after[key]) for key in before)
    model.set_adapter("b")
    assert (output(model, batch) - first).abs().max() > 0.01


def test_it_is_still_so_in_peft():
    pair = graft_pair(llama, DEEPER)
    own = [layer.mlp.down_proj for layer in pair.theirs.base_model.model.model.layers]
    first = [layer.lora_A["default"].weight.detach().clone() for layer in own]
    with quiet():
        pair.theirs.add_adapter("b", peft_config(DEEPER))
    now = pair.theirs.base_model.model.model.layers[2].mlp.down_proj.lora_A["default"].weight
    assert torch.equal(now, first[1]) and not torch.equal(now, first[2])


def test_an_adapter_that_does_not_ask_acts_on_the_layers_there_are_and_says_so(tmp_path: Path):
    model = grafted()
    model.add_adapter("b", LoraConfig(target_modules=["v_proj"]))
    filled(model, "b").set_adapter("b")
    model.save_pretrained(tmp_path, selected_adapters=["b"])
    loaded = PeftModel.from_pretrained(build(llama), tmp_path / "b")
    assert torch.equal(output(loaded.eval(), inputs(model)), output(model, inputs(model)))


@pytest.mark.parametrize("how", ["unload", "delete"])
def test_the_base_comes_back_bit_for_bit(how):
    base = build(llama)
    before, config = fingerprint(base), copy.deepcopy(base.config.to_dict())
    model = grafted(base)
    assert len(base.model.layers) == base.config.num_hidden_layers == 3
    model.unload() if how == "unload" else model.delete_adapter("default")
    assert fingerprint(base) == before and base.config.to_dict() == config


def test_the_base_comes_back_as_it_was_moved_and_switched_since():
    base = build(llama)
    model = grafted(base).double().train()
    model.unload()
    assert all(p.dtype == torch.float64 for p in base.parameters())
    assert base.model.layers.training and base.model.layers[0].training


def test_a_failure_leaves_the_model_as_it_was():
    base = build(llama)
    before = fingerprint(base)
    with pytest.raises(TargetError, match="Nearest"):
        grafted(base, target_modules=["q_porj"])
    assert fingerprint(base) == before and base.config.num_hidden_layers == 2


def test_merged_replicas_are_no_longer_shared_and_give_the_same(tmp_path: Path):
    model = grafted()
    batch = inputs(model)
    expected = output(model, batch)
    merged = model.merge_and_unload()
    torch.testing.assert_close(output(merged, batch), expected)
    assert len(merged.model.layers) == 3
    first, last = merged.model.layers[1], merged.model.layers[2]
    assert not {id(p) for p in first.parameters()} & {id(p) for p in last.parameters()}
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(output(again, batch), expected)


def test_merging_and_unmerging_gives_back_the_shared_weights():
    base = build(llama)
    before = fingerprint(base)
    model = grafted(base)
    expected = output(model, inputs(model))
    model.merge_adapter()
    torch.testing.assert_close(output(model, inputs(model)), expected)
    model.unmerge_adapter()
    model.unload()
    assert fingerprint(base) == before


def test_caches_count_the_replicas():
    model = grafted()
    ids = inputs(model)["input_ids"]
    cached = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    plain = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("ranges", [[[2, 1]], [[0, 1, 2]], [0, 1], "all", [[-1, 2]], [[0, True]]])
def test_what_are_no_ranges_is_refused(ranges):
    with pytest.raises(ConfigError, match=r"pairs \[first layer"):
        LoraConfig(layer_replication=ranges)


def test_layers_that_there_are_not_are_refused():
    with pytest.raises(TargetError, match=r"`model\.layers` has 2 layers, so ranges end at 2"):
        grafted(layer_replication=[[0, 3]])


@pytest.mark.parametrize(("maker", "message"), [(t5, "several lists"), (nn.ReLU, "no list")])
def test_a_model_without_one_list_of_layers_is_refused(maker, message):
    base = nn.Sequential(nn.Linear(2, 2)) if maker is nn.ReLU else t5()
    with pytest.raises(TargetError, match=message):
        get_peft_model(base, LoraConfig(target_modules="all-linear", layer_replication=[[0, 1]]))


def test_replicating_beside_another_adapter_is_refused():
    model = get_peft_model(build(llama), LoraConfig(target_modules=["q_proj"]))
    before = fingerprint(model)
    with pytest.raises(StateError, match="Add the adapter that replicates layers first"):
        model.add_adapter("b", LoraConfig(**DEEPER))
    assert fingerprint(model) == before


def test_replicating_otherwise_than_it_is_is_refused():
    model = grafted()
    with pytest.raises(StateError, match=r"replicated as \[\[0, 2\], \[1, 2\]\]"):
        model.add_adapter("b", LoraConfig(**{**DEEPER, "layer_replication": [[0, 1]]}))


def test_layers_with_hooks_around_their_forward_are_refused():
    base = build(llama)
    base.model.layers[0].forward = base.model.layers[0].forward
    with pytest.raises(TargetError, match="then dispatch the model"):
        grafted(base)
