"""PEFT's verbs of one layer, called on one layer after another as other packages do."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from multigraft import AdapterNameError, LoraConfig, MergeError, StateError, get_peft_model
from multigraft.layer import AdaptedLayer
from multigraft.layer_verbs import AtLayer
from multigraft.tuner import Tuner, inject_adapter_in_model
from tests.laws import fingerprint
from tests.oracle import KINDS, Net, build, graft_pair, random_state
from tests.subject import layers

TARGETS = {"a": ["lin0", "lin1"], "b": ["lin0", "conv1"]}


@pytest.fixture
def net() -> Any:
    """Two adapters in place; both act at `lin0`, and `a` is active."""
    return adapted(build(Net))


def adapted(model: Any) -> Any:
    for seed, (name, targets) in enumerate(TARGETS.items()):
        inject_adapter_in_model(LoraConfig(r=2, target_modules=targets), model, name)
        for layer in layers(model):
            for key, leaf in random_state(layer.state_dict(), seed).items():
                if f".{name}." in key:
                    layer.get_parameter(key).data.copy_(leaf)
    layers(model)[0].set_adapter("a")
    return model


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(16).reshape(2, 8))


def trained(model: nn.Module) -> set[str]:
    return {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad}


def test_one_layers_turn_activates_an_adapter_in_the_whole_model(net: Any) -> None:
    first, *others = layers(net)
    before = outputs(net)
    first.set_adapter(["b"])
    after = outputs(net)
    assert not torch.equal(before, after) and trained(net) == {"b"}
    for layer in others:
        layer.set_adapter(["b"])
    assert torch.equal(outputs(net), after) and first.active_adapters == ["b"]
    first.set_adapter(["a", "b"], inference_mode=True)
    assert first.active_adapter == ["a", "b"] and trained(net) == set()


def test_activating_the_active_adapter_thaws_what_was_frozen_layer_by_layer(net: Any) -> None:
    for layer in layers(net):
        layer.requires_grad_(False)
    for layer in layers(net):
        layer.set_adapter("a")
    assert trained(net) == {"a"}


def test_activating_the_active_adapter_freezes_the_others(net: Any) -> None:
    layers(net)[0].set_requires_grad("b")
    assert trained(net) == {"a", "b"}
    layers(net)[0].set_adapter("a")
    assert trained(net) == {"a"}


def test_an_unknown_adapter_is_refused(net: Any) -> None:
    before = outputs(net)
    for verb in (lambda x: x.set_adapter("z"), lambda x: x.set_requires_grad("z")):
        with pytest.raises(AdapterNameError, match="called `z`"):
            verb(layers(net)[0])
    assert torch.equal(outputs(net), before)


def test_adapters_are_disabled_and_enabled(net: Any) -> None:
    acting, base = outputs(net), outputs(build(Net))
    for layer in layers(net):
        layer.enable_adapters(False)
    assert torch.equal(outputs(net), base)
    for layer in layers(net):
        layer.enable_adapters(enabled=True)
    assert torch.equal(outputs(net), acting)


def test_deleting_layer_by_layer_leaves_the_base_with_the_last() -> None:
    net = build(Net)
    pristine = fingerprint(net)
    adapted(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("a", "b"):
            for module in net.modules():
                if hasattr(module, "delete_adapter"):
                    module.delete_adapter(name)
            assert name not in net.peft_config  # for the caller to take off with the last one
    del net.peft_config
    assert fingerprint(net) == pristine and not layers(net)


def test_a_layer_is_merged_alone_and_comes_back_bit_for_bit(net: Any) -> None:
    lin0, conv1, lin1 = layers(net)
    acting = outputs(net)
    weights = {x: x.base_layer.weight.detach().clone() for x in (lin0, conv1, lin1)}
    lin0.merge()
    assert (lin0.merged_adapters, lin1.merged_adapters) == (["a"], [])
    assert not torch.equal(lin0.base_layer.weight, weights[lin0])
    assert torch.equal(lin1.base_layer.weight, weights[lin1])
    torch.testing.assert_close(outputs(net), acting)
    lin1.merge(safe_merge=True, adapter_names=["a"])
    conv1.merge(adapter_names=["a"])  # which has nothing there
    torch.testing.assert_close(outputs(net), acting)
    for layer in (lin0, conv1, lin1):
        layer.unmerge()
        assert torch.equal(layer.base_layer.weight, weights[layer]) and not layer.merged
    assert torch.equal(outputs(net), acting)


def test_merging_a_layer_is_what_merging_the_model_is(net: Any) -> None:
    whole = copy.deepcopy(net)
    for layer in layers(net):
        layer.merge(adapter_names=["a"])
    Tuner(whole).merge_adapter(["a"])
    for one, other in zip(layers(net), layers(whole), strict=True):
        assert torch.equal(one.base_layer.weight, other.base_layer.weight)
        assert one.merged_adapters == other.merged_adapters


def test_merging_twice_warns_and_merges_once(net: Any) -> None:
    layer = layers(net)[0]
    layer.merge()
    weight = layer.base_layer.weight.clone()
    with pytest.warns(UserWarning, match="lin0: adapters \\['a'\\] are merged already"):
        layer.merge()
    assert torch.equal(layer.base_layer.weight, weight)


def test_a_merge_that_fails_leaves_the_layer(net: Any) -> None:
    layer = layers(net)[0]
    weight = layer.base_layer.weight.clone()
    layer.lora_A["a"].weight.data.fill_(float("nan"))
    with pytest.raises(MergeError, match="lin0"):
        layer.merge()
    assert torch.equal(layer.base_layer.weight, weight) and not layer.merged


def test_a_merged_layer_is_unmerged_only_while_adapters_are_enabled(net: Any) -> None:
    layer = layers(net)[0]
    layer.merge()
    layer.enable_adapters(False)
    with pytest.raises(StateError, match="lin0: adapters are disabled"):
        layer.unmerge()
    layer.enable_adapters(True)
    layer.unmerge()
    layer.unmerge()  # nothing is left to take out
    assert not layer.merged


def test_a_layer_names_the_groups_of_tensors_that_it_has() -> None:
    pair = graft_pair(Net, {"target_modules": KINDS, "r": 2, "use_dora": False}, fill=False)
    theirs = dict(pair.theirs.base_model.model.named_modules())
    for layer in layers(pair.ours.get_base_model()):
        own = layer.adapter_layer_names
        assert own and set(own) <= set(theirs[layer.path].adapter_layer_names)
        assert all(len(theirs[layer.path]._modules[name]) for name in own if "embed" not in name)


def test_the_names_in_a_file_that_depart_from_the_rule_are_told_by_the_layer() -> None:
    config = LoraConfig(target_modules=["lin0"], modules_to_save=["head"])
    model = get_peft_model(build(Net), config).get_base_model()
    lin0, head = layers(model)
    assert lin0.adapter_state_dict_load_map("default") == {}
    assert head.adapter_state_dict_load_map("default") == {
        "weight": "modules_to_save.default.weight",
        "bias": "modules_to_save.default.bias",
    }
    assert head.adapter_state_dict_load_map("another") == {}


def test_adapters_that_somebody_took_out_of_the_model_are_forgotten(net: Any) -> None:
    trainable = {n for n, p in build(Net).named_parameters() if p.requires_grad}
    layers(net)[0].merge()
    fused = layers(net)[0].base_layer.weight.clone()
    for path in ("lin0", "lin1", "conv1"):
        setattr(net, path, getattr(net, path).get_base_layer())
    del net.peft_config
    again = get_peft_model(net, LoraConfig(target_modules=["lin0"]), "a")
    assert list(again.peft_config) == ["a"] and again.active_adapters == ["a"]
    assert torch.equal(net.lin0.base_layer.weight, fused) and not net.lin0.merged
    assert again.base_model.roster.merged == []
    again.delete_adapter("a")
    assert {n for n, p in net.named_parameters() if p.requires_grad} == trainable


def test_a_layers_view_of_the_roster_writes_through(net: Any) -> None:
    layer = layers(net)[0]
    view = AtLayer(layer)
    assert view.touched(["a", "b"]) == [layer] and view.merged == []
    view.losses = {}
    assert layer.roster.losses is view.losses


def test_peft_has_these_verbs_with_these_arguments() -> None:
    theirs: Any = peft.tuners.lora.layer.Linear
    for verb in ("set_adapter", "enable_adapters", "delete_adapter", "merge", "unmerge"):
        ours = list(inspect.signature(getattr(AdaptedLayer, verb)).parameters)
        assert ours == list(inspect.signature(getattr(theirs, verb)).parameters), verb
