"""T1, T2: one adapter trains a whole module that another one has a LoRA on.

PEFT 0.21.2: `get_peft_model(llama, LoraConfig(target_modules="all-linear",
modules_to_save=["lm_head"]))`, then `add_adapter("b", LoraConfig(target_modules="all-linear"))`
puts b's LoRA inside the first adapter's saved head, and `save_pretrained` raises KeyError.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from multigraft import (
    LoraConfig,
    PeftModel,
    StateError,
    get_peft_model,
    get_peft_model_state_dict,
)
from tests.weaknesses import nets

SAVED = LoraConfig(r=2, target_modules=["up"], modules_to_save=["head"])
LORA = LoraConfig(r=2, target_modules=["up", "head"])
X = torch.randn(3, nets.WIDTH, generator=torch.Generator().manual_seed(2))


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=17,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval()


def both(order: str) -> PeftModel:
    """A model with `saved` (a saved head) and `lora` (a LoRA on it), added in this order."""
    configs = {"saved": SAVED, "lora": LORA}
    first, second = ("saved", "lora") if order == "saved first" else ("lora", "saved")
    model = get_peft_model(nets.net(), configs[first], adapter_name=first)
    model.add_adapter(second, configs[second])
    nets.train_by_hand(model, "saved", "lora")
    return model


orders = pytest.mark.parametrize("order", ["saved first", "lora first"])


def test_t01_all_linear_beside_a_saved_head_leaves_the_head_alone() -> None:
    model = get_peft_model(
        llama(),
        LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", modules_to_save=["lm_head"]),
    )
    model.add_adapter("b", LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    head = nets.layer(model, "lm_head")
    assert list(head.grafts) == ["default"]
    nets.never_nested(model)
    inside = {type(m).__name__ for m in head.modules()}
    assert inside == {"AdaptedLayer", "Linear", "AdapterDict"}


@pytest.mark.parametrize("selected", [["default"], ["b"], None])
def test_t01_each_adapter_beside_a_saved_head_is_saved(
    tmp_path: Path, selected: list[str] | None
) -> None:
    config = LoraConfig(
        r=2, task_type="CAUSAL_LM", target_modules="all-linear", modules_to_save=["lm_head"]
    )
    model = get_peft_model(llama(), config)
    model.add_adapter("b", LoraConfig(r=2, task_type="CAUSAL_LM", target_modules="all-linear"))
    nets.train_by_hand(model, "default", "b")
    model.save_pretrained(tmp_path, selected_adapters=selected)
    for name in selected or ["default", "b"]:
        folder = tmp_path if name == "default" else tmp_path / name
        held = load_file(folder / "adapter_model.safetensors")
        assert ("base_model.model.lm_head.weight" in held) == (name == "default")
        assert len(held) == (29 if name == "default" else 28)
        fresh = PeftModel.from_pretrained(llama(), folder)
        model.set_adapter(name)
        ids = torch.arange(6).reshape(1, 6)
        torch.testing.assert_close(fresh(input_ids=ids).logits, model(input_ids=ids).logits)


@orders
def test_t01_a_saved_head_and_a_lora_on_it_stand_side_by_side(order: str) -> None:
    model = both(order)
    head = nets.layer(model, "head")
    assert set(head.grafts) == {"saved", "lora"}
    nets.never_nested(model)
    assert {n for n, _ in head.named_children()} == {
        "base_layer",
        "modules_to_save",
        "lora_A",
        "lora_B",
    }


@orders
def test_t01_each_alone_gives_its_own_change_of_the_base(order: str) -> None:
    model = both(order)
    head = nets.layer(model, "head")
    copy = head.modules_to_save["saved"]
    model.set_adapter("saved")
    torch.testing.assert_close(head(X), F.linear(X, copy.weight, copy.bias))
    model.set_adapter("lora")
    W = head.base_layer.weight + nets.update(head, "lora")
    torch.testing.assert_close(head(X), F.linear(X, W, head.base_layer.bias))
    with model.disable_adapter():
        assert nets.same_bits(head(X), head.base_layer(X))


@orders
@pytest.mark.parametrize("active", [["saved", "lora"], ["lora", "saved"]])
def test_t01_both_active_add_their_changes_of_the_base(order: str, active: list[str]) -> None:
    model = both(order)
    head = nets.layer(model, "head")
    model.set_adapter(active)
    copy = head.modules_to_save["saved"]
    W = copy.weight + nets.update(head, "lora")
    torch.testing.assert_close(head(X), F.linear(X, W, copy.bias))


@orders
@pytest.mark.parametrize("merged", [["saved"], ["lora"], ["saved", "lora"], ["lora", "saved"]])
def test_t01_merging_either_or_both_changes_no_output(order: str, merged: list[str]) -> None:
    model = both(order)
    model.set_adapter(["saved", "lora"])
    head = nets.layer(model, "head")
    before, bits = head(X), head.base_layer.weight.detach().clone()
    for name in merged:
        model.merge_adapter([name])
        torch.testing.assert_close(head(X), before)
    for name in merged:
        model.unmerge_adapter([name])
        torch.testing.assert_close(head(X), before)
    assert nets.same_bits(head.base_layer.weight, bits)


@orders
@pytest.mark.parametrize("gone", ["saved", "lora"])
def test_t01_deleting_one_leaves_the_other_to_the_bit(order: str, gone: str) -> None:
    model = both(order)
    other = "lora" if gone == "saved" else "saved"
    model.set_adapter(other)
    before, state = model(nets.ids()), get_peft_model_state_dict(model, adapter_name=other)
    state = {k: v.clone() for k, v in state.items()}
    model.delete_adapter(gone)
    assert nets.same_bits(model(nets.ids()), before)
    after = get_peft_model_state_dict(model, adapter_name=other)
    assert list(after) == list(state)
    assert all(nets.same_bits(after[k], state[k]) for k in state)


@orders
def test_t01_deleting_both_gives_the_base_back(order: str) -> None:
    bits = nets.base_bits(nets.net())
    model = both(order)
    plain = model.get_base_model()
    model.set_adapter(["saved", "lora"])
    model.merge_adapter()
    model.delete_adapter("saved")
    model.delete_adapter("lora")
    nets.assert_bits(plain, bits)
    assert type(plain.head) is torch.nn.Linear


@orders
def test_t01_each_is_saved_and_loads_beside_the_other(order: str, tmp_path: Path) -> None:
    model = both(order)
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(nets.net(), tmp_path / "lora", adapter_name="lora")
    fresh.load_adapter(tmp_path / "saved", "saved")
    for active in ("saved", "lora", ["saved", "lora"]):
        model.set_adapter(active)
        fresh.set_adapter(active)
        assert nets.same_bits(fresh(nets.ids()), model(nets.ids()))


def test_t01_gradients_reach_the_copy_and_the_lora_and_never_the_base() -> None:
    model = both("saved first")
    model.set_adapter(["saved", "lora"])
    model(nets.ids()).sum().backward()
    for adapter in ("saved", "lora"):
        assert all(p.grad is not None for _, p in nets.own_parameters(model, adapter))
    assert nets.layer(model, "head").base_layer.weight.grad is None


def test_t01_a_mixed_batch_serves_rows_of_both_and_of_the_base() -> None:
    model = both("lora first")
    rows = nets.ids(3)
    mixed = model(rows, adapter_names=["saved", "__base__", "lora"])
    model.set_adapter("saved")
    torch.testing.assert_close(mixed[:1], model(rows[:1]))
    model.set_adapter("lora")
    torch.testing.assert_close(mixed[2:], model(rows[2:]))
    with model.disable_adapter():
        torch.testing.assert_close(mixed[1:2], model(rows[1:2]))


def test_t01_two_trained_copies_of_one_module_cannot_both_stand_for_it() -> None:
    model = get_peft_model(nets.net(), SAVED, adapter_name="a")
    model.add_adapter("b", SAVED)
    before = nets.known(model)
    with pytest.raises(StateError, match=r"head: adapters `a`, `b` each hold a trained copy"):
        model.set_adapter(["a", "b"])
    nets.assert_as_before(model, before)


@pytest.mark.parametrize(
    ("path", "targets"),
    [("embed", ["embed", "up"]), ("conv", ["conv", "up"]), ("norm", None)],
)
def test_t02_other_kinds_of_layers_are_saved_beside_a_lora(
    path: str, targets: list[str] | None
) -> None:
    bits = nets.base_bits(nets.net())
    saved = LoraConfig(r=2, target_modules=["down"], modules_to_save=[path])
    model = get_peft_model(nets.net(), saved, adapter_name="saved")
    model.add_adapter("lora", LoraConfig(r=2, target_modules=targets or "all-linear"))
    nets.train_by_hand(model, "saved", "lora")
    model.set_adapter(["saved", "lora"])
    before = model(nets.ids())
    model.merge_adapter()
    torch.testing.assert_close(model(nets.ids()), before, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(nets.layer(model, path).base_layer.weight, bits[f"{path}.weight"])
    nets.assert_bits(model.unload(), bits)


def test_t02_one_adapter_may_have_a_lora_below_a_container_that_another_saves() -> None:
    whole = LoraConfig(r=2, target_modules=["head"], modules_to_save=["blocks.1"])
    model = get_peft_model(nets.net(), whole, adapter_name="whole")
    model.add_adapter("lora", LoraConfig(r=2, target_modules=["up", "down"]))
    nets.never_nested(model)
    nets.train_by_hand(model, "whole", "lora")
    model.set_adapter(["whole", "lora"])
    down = nets.layer(model, "blocks.1.down")
    x = torch.randn(2, 12)
    W = down.modules_to_save["whole"].weight + nets.update(down, "lora")
    torch.testing.assert_close(down(x), F.linear(x, W))
