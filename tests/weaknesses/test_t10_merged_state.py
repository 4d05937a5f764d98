"""T10, T13, T23, T27: a merge remembers exactly what it added.

PEFT 0.21.2: `merge_adapter(); load_adapter(d, "default"); unmerge_adapter()` corrupts the base; so
does `set_scale` between the two; `merge_adapter(["a"])` with a and b active silences b; twenty
merge/unmerge cycles in bfloat16 drift tenfold.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from multigraft import (
    LoraConfig,
    PeftModel,
    StateError,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from tests.weaknesses import nets

CONFIG = LoraConfig(r=2, target_modules=["up", "down", "conv", "embed"], modules_to_save=["head"])
PLAIN = LoraConfig(r=3, target_modules=["up", "conv", "embed"], use_rslora=True, bias="lora_only")


def two(active: list[str] | None = None) -> PeftModel:
    model = get_peft_model(nets.net(), CONFIG, adapter_name="a")
    model.add_adapter("b", PLAIN)
    nets.train_by_hand(model, "a", "b")
    model.set_adapter(active or ["a", "b"])
    return model


def refusals(tmp_path: Path) -> list[Callable[[PeftModel], object]]:
    other = get_peft_model(nets.net(), CONFIG, adapter_name="a")
    nets.train_by_hand(other, "a", seed=9)
    other.save_pretrained(tmp_path)
    state = get_peft_model_state_dict(other, adapter_name="a")

    def scale(model: PeftModel, how: str) -> None:
        up = nets.layer(model, "blocks.0.up")
        if how == "set_scale":
            up.set_scale("a", 3.0)
        elif how == "scale_layer":
            up.scale_layer(2.0)
        elif how == "unscale_layer":
            up.unscale_layer()
        else:
            up.scaling["a"] = 7.0

    return [
        lambda m: m.load_adapter(tmp_path / "a", "a"),
        lambda m: set_peft_model_state_dict(m, state, adapter_name="a"),
        lambda m: scale(m, "set_scale"),
        lambda m: scale(m, "scale_layer"),
        lambda m: scale(m, "unscale_layer"),
        lambda m: scale(m, "scaling"),
    ]


@pytest.mark.parametrize("which", range(6))
def test_t10_changing_a_merged_adapter_is_refused_and_changes_nothing(
    which: int, tmp_path: Path
) -> None:
    change = refusals(tmp_path)[which]
    model = two(["a"])
    model.merge_adapter()
    before, output = nets.known(model), model(nets.ids())
    with pytest.raises(StateError, match=r"`a`.*merged.*unmerge_adapter\(\) first"):
        change(model)
    nets.assert_as_before(model, before)
    assert nets.same_bits(model(nets.ids()), output)


@pytest.mark.parametrize("which", range(6))
def test_t10_the_same_change_is_taken_after_unmerging(which: int, tmp_path: Path) -> None:
    change = refusals(tmp_path)[which]
    model = two(["a"])
    output = model(nets.ids())
    model.merge_adapter()
    model.unmerge_adapter()
    change(model)
    assert (which == 4) == torch.equal(model(nets.ids()), output)


def test_t10_changing_an_adapter_beside_a_merged_one_is_free(tmp_path: Path) -> None:
    bits = nets.base_bits(nets.net())
    model = two()
    model.save_pretrained(tmp_path)
    model.merge_adapter(["a"])
    nets.train_by_hand(model, "b", seed=8)
    model.load_adapter(tmp_path / "b", "b")
    nets.layer(model, "blocks.0.up").set_scale("b", 2.0)
    merged = model(nets.ids())
    model.unmerge_adapter()
    torch.testing.assert_close(model(nets.ids()), merged)
    nets.assert_bits(model.unload(), bits)


@pytest.mark.parametrize("order", [["a", "b"], ["b", "a"]])
def test_t10_tensors_changed_in_place_while_merged_leave_the_bits_after_unmerge(
    order: list[str],
) -> None:
    bits = nets.base_bits(nets.net())
    model = two()
    model.merge_adapter(["a"])
    nets.train_by_hand(model, "a", seed=7)
    model.merge_adapter(["b"])
    nets.train_by_hand(model, "b", seed=6)
    for name in order:
        model.unmerge_adapter([name])
    fresh = model.get_base_model().state_dict()
    for name, value in bits.items():
        path, _, leaf = name.rpartition(".")
        assert nets.same_bits(fresh.get(f"{path}.base_layer.{leaf}", fresh.get(name)), value), name


def test_t10_what_stays_merged_is_what_was_merged_not_what_the_adapter_became() -> None:
    model = two()
    model.merge_adapter(["a"])
    alone = nets.layer(model, "blocks.0.up").base_layer.weight.detach().clone()
    model.merge_adapter(["b"])
    nets.train_by_hand(model, "a", seed=7)
    model.unmerge_adapter(["b"])
    after = nets.layer(model, "blocks.0.up").base_layer.weight
    torch.testing.assert_close(after, alone, rtol=0, atol=1e-7)


def test_t10_without_the_original_unmerge_subtracts_what_was_added() -> None:
    bits = nets.base_bits(nets.net())
    config = LoraConfig(r=2, target_modules=["up", "conv", "embed"])
    model = get_peft_model(nets.net(), config)
    nets.train_by_hand(model, "default")
    model.merge_adapter(keep_original=False)
    assert not any(x.kept for x in model.roster.layers["default"])
    nets.train_by_hand(model, "default", seed=7)
    model.unmerge_adapter()
    for layer in model.roster.layers["default"]:
        expected = bits[f"{layer.path}.weight"]
        torch.testing.assert_close(layer.base_layer.weight, expected, rtol=0, atol=1e-6)


def test_t10_merging_gives_the_value_that_a_merge_in_one_step_gives() -> None:
    one, other = two(), two()
    one.merge_adapter(["a", "b"])
    other.merge_adapter(["b"])
    other.merge_adapter(["a"])
    for x, y in zip(one.roster.layers["a"], other.roster.layers["a"], strict=True):
        torch.testing.assert_close(x.base_layer.weight, y.base_layer.weight)


@pytest.mark.parametrize("merged", [["a"], ["b"]])
def test_t13_merging_one_of_two_active_adapters_leaves_the_other_acting(merged: list[str]) -> None:
    model = two()
    before = model(nets.ids())
    model.merge_adapter(merged)
    torch.testing.assert_close(model(nets.ids()), before)
    assert model.active_adapters == ["a", "b"]
    model.unmerge_adapter()
    torch.testing.assert_close(model(nets.ids()), before)


def test_t13_merging_an_inactive_adapter_adds_it_to_the_active_one() -> None:
    model = two(["a"])
    model.merge_adapter(["b"])
    merged = model(nets.ids())
    model.unmerge_adapter()
    model.set_adapter(["a", "b"])
    torch.testing.assert_close(merged, model(nets.ids()))


def test_t13_the_unmerged_one_of_two_goes_on_training() -> None:
    model = two()
    model.merge_adapter(["a"])
    model(nets.ids()).sum().backward()
    assert all(p.grad is not None for _, p in nets.own_parameters(model, "b"))
    assert all(p.grad is None for _, p in nets.own_parameters(model, "a"))


@pytest.mark.parametrize("saved", [None, ["head"], ["head", "norm"]])
@pytest.mark.parametrize("active", [["a"], ["b"], ["a", "c"]])
def test_t23_merge_and_unload_of_one_adapter_is_that_adapter_whoever_is_active(
    saved: list[str] | None, active: list[str]
) -> None:
    model = get_peft_model(nets.net(), CONFIG, adapter_name="a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["up"], modules_to_save=saved))
    model.add_adapter("c", PLAIN)
    nets.train_by_hand(model, "a", "b", "c")
    model.set_adapter("b")
    expected = model(nets.ids())
    model.set_adapter(active)
    merged = model.merge_and_unload(adapter_names=["b"])
    torch.testing.assert_close(merged(nets.ids()), expected)
    assert list(merged.state_dict()) == list(nets.net().state_dict())


def test_t23_merge_and_unload_of_several_is_their_sum() -> None:
    model = two()
    model.add_adapter("c", CONFIG)
    expected = model(nets.ids())
    model.set_adapter("c")
    merged = model.merge_and_unload(adapter_names=["b", "a"])
    torch.testing.assert_close(merged(nets.ids()), expected)


def test_t23_merge_and_unload_that_is_refused_leaves_the_active_adapter() -> None:
    model = two(["b"])
    model.add_adapter("c", CONFIG)
    before = nets.known(model)
    with pytest.raises(StateError, match="each hold a trained copy"):
        model.merge_and_unload(adapter_names=["a", "c"])
    nets.assert_as_before(model, before)


def test_t23_merge_and_unload_keeps_what_is_merged_already() -> None:
    model = two()
    expected = model(nets.ids())
    model.merge_adapter(["a"])
    merged = model.merge_and_unload(adapter_names=["b"])
    torch.testing.assert_close(merged(nets.ids()), expected)


@pytest.mark.parametrize("merged_before", [False, True])
def test_t23_merge_and_unload_of_disabled_adapters_is_refused(merged_before: bool) -> None:
    model = two()
    if merged_before:
        model.merge_adapter()
    model.base_model.disable_adapter_layers()
    before = nets.known(model)
    with pytest.raises(StateError, match="adapters are disabled"):
        model.merge_and_unload()
    nets.assert_as_before(model, before)


def test_t23_set_adapter_of_an_unknown_name_is_refused_on_every_handle() -> None:
    model = two(["a"])
    before = nets.known(model)
    for handle in (model, model.base_model):
        with pytest.raises(ValueError, match=r"no adapter is called `typo`.*There are: `a`, `b`"):
            handle.set_adapter("typo")
    nets.assert_as_before(model, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [True, False])
def test_t27_many_cycles_of_merging_leave_every_bit(dtype: torch.dtype, autocast: bool) -> None:
    bits = nets.base_bits(nets.net().to(dtype))
    model = get_peft_model(
        nets.net().to(dtype), CONFIG, adapter_name="a", autocast_adapter_dtype=autocast
    )
    model.add_adapter("b", PLAIN, autocast_adapter_dtype=autocast)
    nets.train_by_hand(model, "a", "b")
    model.set_adapter(["a", "b"])
    first = None
    for cycle in range(20):
        names = [["a", "b"], ["b", "a"], ["a"], ["b"]][cycle % 4]
        for name in names:
            model.merge_adapter([name])
        if cycle % 4 == 0:
            value = nets.layer(model, "blocks.0.up").base_layer.weight.detach().clone()
            first = value if first is None else first
            assert nets.same_bits(value, first)
        for name in names[:: 1 if cycle % 3 else -1]:
            model.unmerge_adapter([name])
    nets.assert_bits(model.unload(), bits)


def test_t27_a_merge_is_computed_in_float32_and_rounded_once() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 48)).to(torch.bfloat16)
    W = base[0].weight.detach().float()
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["0"]))
    nets.train_by_hand(model, "default")
    adapted = nets.layer(model, "0")
    exact = W + nets.update(adapted, "default")
    model.merge_adapter()
    assert nets.same_bits(adapted.base_layer.weight, exact.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_t27_a_model_cast_while_merged_gets_its_own_weights_back(dtype: torch.dtype) -> None:
    model = two()
    model.merge_adapter()
    model.to(dtype)
    model.unmerge_adapter()
    expected = nets.net().to(dtype)
    for layer in model.roster.layers["a"]:
        own = expected.get_submodule(layer.path).weight
        assert nets.same_bits(layer.base_layer.weight, own)


def test_t10_deleting_a_merged_adapter_gives_the_bits_back_whatever_it_became() -> None:
    bits = nets.base_bits(nets.net())
    model = two()
    model.merge_adapter()
    nets.train_by_hand(model, "a", "b", seed=3)
    model.delete_adapter("b")
    model.delete_adapter("a")
    nets.assert_bits(model.get_base_model(), bits)


@pytest.mark.parametrize("how", ["copy", "pickle"])
def test_t10_a_copy_of_a_merged_model_unmerges_by_itself(how: str) -> None:
    bits = nets.base_bits(nets.net())
    model = get_peft_model(nets.net(), LoraConfig(r=2, target_modules=["up", "head"]))
    nets.train_by_hand(model, "default")
    model.merge_adapter()
    twin = copy.deepcopy(model) if how == "copy" else pickle.loads(pickle.dumps(model))
    output = model(nets.ids())
    assert twin.roster.merged == ["default"]
    nets.assert_bits(twin.unload(), bits)
    assert model.roster.merged == ["default"]
    assert nets.same_bits(model(nets.ids()), output)
    nets.assert_bits(model.unload(), bits)
