"""The weaknesses once more, on models that were adapted in place: no handle stands in between.

Adapters go in through `inject_adapter_in_model` and their tensors in and out through state dicts,
as packages use it that keep their own model class; a handle, where a step needs one, is put around
the adapted model afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multigraft import (
    AdapterNameError,
    CheckpointError,
    LoraConfig,
    MultigraftWarning,
    PeftModel,
    StateError,
    TargetError,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from tests.weaknesses import nets

SAVED = LoraConfig(r=2, target_modules=["up"], modules_to_save=["head"])
LORA = LoraConfig(r=2, target_modules=["up", "head"])
IDS = nets.ids()


def injected(**configs: LoraConfig) -> nets.Net:
    """A plain model with these adapters in it, trained; the last one is active."""
    model = nets.net()
    for name, config in configs.items():
        assert inject_adapter_in_model(config, model, adapter_name=name) is model
    nets.train_by_hand(model, *configs)
    return model


def handle_of(model: nn.Module) -> PeftModel:
    """A handle to the adapters that are there."""
    return PeftModel(model, None)


def state_of(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Copies of one adapter's tensors."""
    state = get_peft_model_state_dict(model, adapter_name=adapter)
    return {key: tensor.detach().clone() for key, tensor in state.items()}


@pytest.mark.parametrize("names", [["saved", "lora"], ["lora", "saved"]])
def test_t01_a_saved_head_and_a_lora_on_it_are_injected_side_by_side(names: list[str]) -> None:
    configs = {"saved": SAVED, "lora": LORA}
    model = injected(**{name: configs[name] for name in names})
    nets.never_nested(model)
    keys = {name: set(state_of(model, name)) for name in names}
    up = {f"blocks.{i}.up.lora_{x}.weight" for i in (0, 1) for x in "AB"}
    assert keys["saved"] == up | {"head.weight", "head.bias"}
    assert keys["lora"] == up | {"head.lora_A.weight", "head.lora_B.weight"}


@pytest.mark.parametrize("names", [["saved", "lora"], ["lora", "saved"]])
def test_t02_what_is_injected_beside_a_saved_head_moves_into_a_fresh_model(
    names: list[str],
) -> None:
    configs = {"saved": SAVED, "lora": LORA}
    model = injected(**{name: configs[name] for name in names})
    fresh = injected(**{name: configs[name] for name in reversed(names)})
    for name in names:
        set_peft_model_state_dict(fresh, state_of(model, name), adapter_name=name)
        ours, theirs = handle_of(model), handle_of(fresh)
        ours.set_adapter(name)
        theirs.set_adapter(name)
        assert nets.same_bits(theirs(IDS), ours(IDS))


def test_t02_a_saved_head_and_a_lora_on_it_are_deleted_in_any_order() -> None:
    for first in ("saved", "lora"):
        bits = nets.base_bits(nets.net())
        model = injected(saved=SAVED, lora=LORA)
        handle = handle_of(model)
        handle.set_adapter(["saved", "lora"])
        handle.delete_adapter(first)
        handle.delete_adapter("lora" if first == "saved" else "saved")
        nets.assert_bits(model, bits)


@pytest.mark.parametrize("beside", [False, True])
def test_t03_an_injection_that_fails_half_way_leaves_no_layer_behind(beside: bool) -> None:
    model = injected(a=LORA) if beside else nets.net()
    model.act = nn.ReLU()
    before = nets.known(model)
    with pytest.raises(TargetError, match="act"):
        inject_adapter_in_model(LoraConfig(target_modules=["down", "act"]), model, "b")
    nets.assert_as_before(model, before)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["down"]), model, "b")
    own = {f"blocks.{i}.down.lora_{x}.b.weight" for i in (0, 1) for x in "AB"}
    assert nets.trainable(model) >= own
    assert all(".b." not in name or name in own for name in nets.trainable(model))
    assert not any("base_layer" in name for name in nets.trainable(model))


@pytest.mark.parametrize("name", ["up", "head", "blocks", "norm", "lora_A", "base_layer"])
def test_t05_an_injected_adapter_named_like_a_module_takes_no_key_of_another(name: str) -> None:
    alone = set(state_of(injected(plain=SAVED), "plain"))
    model = injected(**{"plain": SAVED, name: SAVED})
    assert set(state_of(model, "plain")) == alone
    assert set(state_of(model, name)) == alone
    handle_of(model).delete_adapter(name)
    assert set(state_of(model, "plain")) == alone


@pytest.mark.parametrize("name", ["mlp", "self_attn", "model", "layers", "lm_head"])
def test_t05_a_llama_with_an_adapter_named_like_its_parts_saves_every_key(
    name: str, tmp_path: Path
) -> None:
    from tests.weaknesses.test_t01_saved_module_beside_lora import llama

    config = LoraConfig(r=2, target_modules="all-linear")
    model = get_peft_model(llama(), config)
    model.add_adapter(name, config)
    nets.train_by_hand(model, "default", name)
    model.save_pretrained(tmp_path)
    for adapter, folder in (("default", tmp_path), (name, tmp_path / name)):
        fresh = PeftModel.from_pretrained(llama(), folder, adapter_name=adapter)
        ours, theirs = (get_peft_model_state_dict(m, adapter_name=adapter) for m in (model, fresh))
        assert len(ours) == 28
        assert list(ours) == list(theirs)
        assert all(nets.same_bits(ours[key], theirs[key]) for key in ours)


CHANGES: list[Callable[[Any], object]] = [
    lambda m: set_peft_model_state_dict(m, state_of(m, "b"), adapter_name="a"),
    lambda m: nets.layer(m, "head").set_scale("a", 9.0),
    lambda m: nets.layer(m, "blocks.0.up").scaling.update(a=9.0),
]


@pytest.mark.parametrize("which", range(len(CHANGES)))
def test_t10_a_merged_adapter_of_an_injected_model_cannot_be_changed(which: int) -> None:
    model, bits = injected(a=LORA, b=LORA), nets.base_bits(nets.net())
    handle_of(model).merge_adapter(["a"])
    before = nets.known(model)
    with pytest.raises(StateError, match="merged"):
        CHANGES[which](model)
    nets.assert_as_before(model, before)
    handle_of(model).unmerge_adapter()
    nets.assert_bits(handle_of(model).unload(), bits)


def test_t11_an_injected_adapter_adopts_the_config_of_a_file_loaded_over_it(
    tmp_path: Path,
) -> None:
    loud = LoraConfig(r=2, lora_alpha=64, target_modules=["up", "head"])
    handle_of(injected(default=loud)).save_pretrained(tmp_path)
    model = injected(default=LORA)
    handle_of(model).load_adapter(tmp_path, "default")
    assert nets.layer(model, "head").scaling["default"] == 32.0


def test_t12_disabling_an_injected_model_changes_no_flag() -> None:
    frozen = LoraConfig(r=2, target_modules=["up", "head"], inference_mode=True)
    model = injected(a=LORA, b=frozen)
    before, flags = nets.known(model), nets.trainable(model)
    with handle_of(model).disable_adapter():
        assert nets.trainable(model) == flags
        assert nets.same_bits(model(IDS), nets.net()(IDS))
    nets.assert_as_before(model, before)
    assert not any(".b." in name for name in flags)


@pytest.mark.parametrize("merged", ["a", "b"])
def test_t13_merging_one_injected_adapter_leaves_the_other_acting(merged: str) -> None:
    model = injected(a=LORA, b=LORA)
    handle = handle_of(model)
    handle.set_adapter(["a", "b"])
    before = model(IDS)
    handle.merge_adapter([merged])
    torch.testing.assert_close(model(IDS), before)


def test_t14_the_same_name_injected_twice_is_refused_and_trained_values_stay() -> None:
    model = injected(default=LORA)
    before = nets.known(model)
    for again in (
        lambda: inject_adapter_in_model(LORA, model),
        lambda: get_peft_model(model, LORA),
        lambda: inject_adapter_in_model(LORA, handle_of(model)),
    ):
        with pytest.raises(AdapterNameError, match="adapter `default` exists"):
            again()
        nets.assert_as_before(model, before)


def test_t14_injecting_into_a_handle_goes_beside_what_it_has_and_saves_plain_keys() -> None:
    handle = get_peft_model(nets.net(), LORA)
    assert inject_adapter_in_model(LORA, handle, "b") is handle
    nets.never_nested(handle)
    assert handle.active_adapters == get_model_status(handle).active_adapters == ["b"]
    prefix = "base_model.model."
    ours = {key.removeprefix(prefix) for key in state_of(handle, "b")}
    assert ours == set(state_of(handle.get_base_model(), "b"))
    assert not any(prefix in key for key in ours)


def test_t15_one_config_injected_into_two_models_means_each_models_own_layers() -> None:
    config = LoraConfig(r=2, target_modules="all-linear")
    given = config.to_dict()
    first, second = nets.net(), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    inject_adapter_in_model(config, first)
    inject_adapter_in_model(config, second)
    assert {s.name for s in get_layer_status(second)} == {"0", "1"}
    assert len(get_layer_status(first)) == 5
    assert config.to_dict() == given
    assert first.peft_config["default"] is not second.peft_config["default"]


def test_t15_a_config_injected_from_a_state_dict_keeps_its_targets() -> None:
    state = state_of(injected(default=LORA), "default")
    config = LoraConfig(r=2, target_modules=["conv"])
    model = inject_adapter_in_model(config, nets.net(), state_dict=state)
    assert config.target_modules == ["conv"]
    assert {s.name for s in get_layer_status(model)} == {"blocks.0.up", "blocks.1.up", "head"}


class Shared(nn.Module):
    """One linear layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 4)
        self.right = self.left

    def forward(self, x: Tensor) -> Tensor:
        return self.right(F.silu(self.left(x)))


@pytest.mark.parametrize("names", [["left"], ["right"], ["left", "right"]])
def test_t16_a_shared_layer_is_injected_once_and_merging_changes_no_output(
    names: list[str],
) -> None:
    torch.manual_seed(0)
    model = Shared().eval()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=names), model, "a")
    assert model.left is model.right
    assert len(get_layer_status(model)) == 1
    nets.train_by_hand(model, "a")
    x = torch.randn(3, 4)
    before = model(x)
    handle_of(model).merge_adapter()
    torch.testing.assert_close(model(x), before)


def test_t17_an_injected_adapter_leaves_modules_named_like_its_own_parts() -> None:
    torch.manual_seed(0)
    parts = {"lora_A": nn.Linear(4, 4), "flora_b": nn.Linear(4, 4), "base_layer": nn.Linear(4, 4)}
    model = nn.Sequential(*parts.values())
    for name, part in parts.items():
        model.add_module(name, part)
    bits = nets.base_bits(model)
    inject_adapter_in_model(LoraConfig(r=2, target_modules="all-linear"), model, "a")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["flora_b"]), model, "b")
    handle = handle_of(model)
    with pytest.warns(MultigraftWarning, match="`a` is active now"):
        handle.delete_adapter("b")
    assert {tuple(s.available_adapters) for s in get_layer_status(model)} == {("a",)}
    handle.delete_adapter("a")
    nets.assert_bits(model, bits)


@pytest.mark.parametrize("targets", [["up", "donw"], ["upp"], "up", ["embedd", "conv"]])
def test_t18_a_typo_is_refused_by_injection_too(targets: Any) -> None:
    model = nets.net()
    before = nets.known(model)
    with pytest.raises(TargetError, match=r"Nearest|must stand in a list"):
        inject_adapter_in_model(LoraConfig(target_modules=targets), model)
    nets.assert_as_before(model, before)


def test_t22_after_the_last_deletion_an_injected_model_is_its_own_again() -> None:
    model, bits = injected(a=SAVED), nets.base_bits(nets.net())
    handle_of(model).delete_adapter("a")
    nets.assert_bits(model, bits)
    assert not hasattr(model, "peft_config")
    assert type(model.head) is nn.Linear
    inject_adapter_in_model(LORA, model, "n")
    assert get_model_status(model).active_adapters == ["n"]


@pytest.mark.parametrize("name", ["a", "b"])
def test_t23_merging_one_injected_adapter_away_is_that_adapter(name: str) -> None:
    model = injected(a=SAVED, b=SAVED)
    handle = handle_of(model)
    handle.set_adapter(name)
    alone = model(IDS)
    handle.set_adapter("b" if name == "a" else "a")
    merged = handle.merge_and_unload(adapter_names=[name])
    assert merged is model
    torch.testing.assert_close(model(IDS), alone)


def drop(state: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {k: t for k, t in state.items() if k != key}


MISFITS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "missing": (lambda s: drop(s, "head.lora_A.weight"), "missing.*head.lora_A.weight"),
    "extra": (lambda s: s | {"down.lora_A.weight": torch.ones(2, 2)}, "not part of.*down.lora_A"),
    "misshapen": (lambda s: s | {"head.lora_A.weight": torch.ones(3, 8)}, r"\(3, 8\) instead"),
    "not finite": (
        lambda s: s | {"head.lora_A.weight": torch.full((2, 8), torch.nan)},
        "NaN or infinity.*head.lora_A.weight",
    ),
    "nothing": (lambda s: {}, "missing"),
}


@pytest.mark.parametrize("which", MISFITS)
def test_t24_a_state_dict_that_does_not_fit_an_injected_adapter_is_refused(which: str) -> None:
    model = injected(a=LORA, b=LORA)
    change, message = MISFITS[which]
    state = change(state_of(model, "b"))
    before = nets.known(model)
    with pytest.raises(CheckpointError, match=message):
        set_peft_model_state_dict(model, state, adapter_name="a")
    nets.assert_as_before(model, before)


@pytest.mark.parametrize("name", ["v1.0", "keys", "items", "0", "a b"])
def test_t26_any_name_is_injected_and_moved_by_state_dict(name: str) -> None:
    model, fresh = injected(**{name: SAVED}), injected(**{name: SAVED})
    nets.train_by_hand(model, name, seed=9)
    set_peft_model_state_dict(fresh, state_of(model, name), adapter_name=name)
    assert nets.same_bits(fresh(IDS), model(IDS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_t27_cycles_of_merging_an_injected_model_leave_every_bit(dtype: torch.dtype) -> None:
    plain = nets.net().to(dtype)
    bits = nets.base_bits(plain)
    inject_adapter_in_model(LORA, plain, "a")
    inject_adapter_in_model(LORA, plain, "b")
    nets.train_by_hand(plain, "a", "b")
    handle = handle_of(plain)
    for names in (["a"], ["b"], ["a", "b"], ["b", "a"]) * 3:
        handle.merge_adapter(names)
        handle.unmerge_adapter(names[::-1])
    nets.assert_bits(handle.unload(), bits)
