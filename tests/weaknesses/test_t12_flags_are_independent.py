"""T12, T14, T22: `requires_grad`, active and merged are three things; so are two handles' views.

PEFT 0.21.2: `with m.disable_adapter(): pass` on an inference adapter makes it trainable;
`get_peft_model` twice with one name resets trained tensors; deleting the last adapter of a causal
LM makes its forward raise KeyError.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from multigraft import (
    AdapterNameError,
    LoraConfig,
    MultigraftWarning,
    PeftModel,
    StateError,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from tests.weaknesses import nets

CONFIG = LoraConfig(r=2, target_modules=["up", "conv", "embed"], modules_to_save=["head"])
OTHER = LoraConfig(r=2, target_modules=["up", "head"], bias="lora_only")


def model_with(trains: bool = True) -> PeftModel:
    model = get_peft_model(nets.net(), CONFIG, adapter_name="a")
    model.add_adapter("b", OTHER)
    nets.train_by_hand(model, "a", "b")
    model.set_adapter("a", inference_mode=not trains)
    return model


def flags(model: PeftModel) -> dict[str, bool]:
    return {n: p.requires_grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("merged", [[], ["a"], ["b"], ["a", "b"]])
@pytest.mark.parametrize("inside", ["nothing", "forward", "backward", "error"])
def test_t12_disabling_changes_nothing_that_lasts(
    trains: bool, merged: list[str], inside: str
) -> None:
    model = model_with(trains)
    if merged:
        model.merge_adapter(merged)
    before, output = nets.known(model), model(nets.ids())
    plain = nets.net()(nets.ids())
    try:
        with model.disable_adapter():
            if inside != "nothing":
                assert nets.same_bits(model(nets.ids()), plain)
            if inside == "error":
                raise KeyError
    except KeyError:
        pass
    nets.assert_as_before(model, before)
    assert nets.same_bits(model(nets.ids()), output)


def test_t12_disabling_twice_enables_at_the_outer_end() -> None:
    model = model_with()
    model.merge_adapter()
    output = model(nets.ids())
    with model.disable_adapter():
        with model.disable_adapter():
            pass
        assert nets.same_bits(model(nets.ids()), nets.net()(nets.ids()))
    assert nets.same_bits(model(nets.ids()), output)


def test_t12_flags_set_inside_the_block_stay() -> None:
    model = model_with(trains=False)
    with model.disable_adapter():
        model.base_model.set_requires_grad("b", True)
    assert all(p.requires_grad for _, p in nets.own_parameters(model, "b"))
    assert not any(p.requires_grad for _, p in nets.own_parameters(model, "a"))


@pytest.mark.parametrize("step", ["merge", "unmerge", "add", "delete", "load", "disable", "batch"])
@pytest.mark.parametrize("trains", [True, False])
def test_t12_no_step_but_set_adapter_changes_anothers_flags(
    step: str, trains: bool, tmp_path: Path
) -> None:
    model = model_with(trains)
    model.base_model.set_requires_grad("b", not trains)
    model.save_pretrained(tmp_path)
    before = flags(model)
    if step in ("merge", "unmerge"):
        model.merge_adapter(["a", "b"])
    if step == "unmerge":
        model.unmerge_adapter()
    if step in ("add", "delete"):
        model.add_adapter("c", CONFIG)
    if step == "delete":
        model.delete_adapter("c")
    if step == "load":
        model.load_adapter(tmp_path / "a", "c", is_trainable=True)
        model.load_adapter(tmp_path / "a", "b")
    if step == "disable":
        model.base_model.disable_adapter_layers()
        model.base_model.enable_adapter_layers()
    if step == "batch":
        model(nets.ids(2), adapter_names=["b", "__base__"])
    after = flags(model)
    shared = before.keys() & after.keys()
    kept = {n for n in shared if ".b" not in n} if step == "load" else shared
    assert kept
    assert {n: after[n] for n in kept} == {n: before[n] for n in kept}
    if step == "load":
        held = {p.requires_grad for _, p in nets.own_parameters(model, "b")}
        assert held == {not trains}


def test_t12_an_inactive_adapter_can_be_thawed_without_becoming_active() -> None:
    model = model_with()
    model.base_model.set_requires_grad("b", True)
    assert model.active_adapters == ["a"]
    model(nets.ids()).sum().backward()
    assert all(p.grad is None for _, p in nets.own_parameters(model, "b"))


def test_t12_set_adapter_freezes_what_was_trainable_and_leaves_flags_set_by_hand() -> None:
    model = get_peft_model(nets.net(), CONFIG, adapter_name="a")
    for name in ("b", "c"):
        model.add_adapter(name, CONFIG)
    model.base_model.set_requires_grad("b")
    by_hand = [tensor for _, tensor in nets.own_parameters(model, "c")]
    for tensor in by_hand:
        tensor.requires_grad_(True)
    model.set_adapter("a")
    assert not any(t.requires_grad for _, t in nets.own_parameters(model, "b"))
    assert all(t.requires_grad for t in by_hand)
    model.set_adapter("c")
    model.set_adapter("a")
    assert not any(t.requires_grad for t in by_hand)


def test_t12_a_merged_adapter_may_be_inactive_and_frozen_or_not() -> None:
    model = model_with()
    model.merge_adapter(["b"])
    assert model.active_adapters == ["a"]
    assert not any(p.requires_grad for _, p in nets.own_parameters(model, "b"))
    assert all(p.requires_grad for _, p in nets.own_parameters(model, "a"))


@pytest.mark.parametrize("config", [CONFIG, OTHER])
def test_t14_the_same_name_twice_is_refused_and_trained_values_stay(config: LoraConfig) -> None:
    first = get_peft_model(nets.net(), CONFIG)
    nets.train_by_hand(first, "default")
    before = nets.known(first)
    with pytest.raises(AdapterNameError, match="adapter `default` exists"):
        get_peft_model(first.get_base_model(), config)
    nets.assert_as_before(first, before)


@pytest.mark.parametrize("through", ["base", "handle", "tuner"])
def test_t14_a_second_get_peft_model_grafts_beside_the_first(through: str, tmp_path: Path) -> None:
    first = get_peft_model(nets.net(), CONFIG)
    nets.train_by_hand(first, "default")
    onto = {"base": first.get_base_model(), "handle": first, "tuner": first.base_model}[through]
    second = get_peft_model(onto, CONFIG, adapter_name="b")
    nets.never_nested(second)
    assert second.get_base_model() is first.get_base_model()
    assert set(get_peft_model_state_dict(second)) == set(
        get_peft_model_state_dict(second, adapter_name="b")
    )
    second.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "b"):
        fresh = PeftModel.from_pretrained(nets.net(), folder)
        assert len(get_peft_model_state_dict(fresh)) == 10


def test_t14_both_handles_report_what_runs() -> None:
    first = get_peft_model(nets.net(), CONFIG)
    second = get_peft_model(first, OTHER, adapter_name="b")
    assert first.active_adapters == second.active_adapters == ["b"]
    first.set_adapter("default")
    assert second.active_adapters == ["default"]
    assert list(first.peft_config) == list(second.peft_config) == ["default", "b"]
    second.unload()
    assert first.active_adapters == []
    assert not first.peft_config


def test_t14_an_injected_model_takes_a_handle_afterwards() -> None:
    injected = inject_adapter_in_model(CONFIG, nets.net())
    handle = get_peft_model(injected, OTHER, adapter_name="b")
    assert set(handle.peft_config) == {"default", "b"}
    nets.never_nested(handle)
    nets.assert_bits(handle.unload(), nets.base_bits(nets.net()))


@pytest.mark.parametrize("merged", [False, True])
def test_t22_after_the_last_deletion_the_base_runs_and_a_new_adapter_acts(merged: bool) -> None:
    model = get_peft_model(nets.net(), CONFIG)
    nets.train_by_hand(model, "default")
    if merged:
        model.merge_adapter()
    model.delete_adapter("default")
    assert model.active_adapters == []
    assert nets.same_bits(model(nets.ids()), nets.net()(nets.ids()))
    nets.assert_bits(model.get_base_model(), nets.base_bits(nets.net()))
    model.add_adapter("n", OTHER)
    assert model.active_adapters == ["n"]
    nets.train_by_hand(model, "n")
    assert not torch.equal(model(nets.ids()), nets.net()(nets.ids()))
    assert all(p.requires_grad for _, p in nets.own_parameters(model, "n"))


def test_t22_after_the_last_deletion_the_base_trains_again_as_before() -> None:
    base = nets.net()
    base.norm.requires_grad_(False)
    before = nets.trainable(base)
    model = get_peft_model(base, CONFIG)
    assert not nets.trainable(model) & before
    model.delete_adapter("default")
    assert nets.trainable(base) == before


def test_t22_what_needs_an_adapter_says_that_there_is_none(tmp_path: Path) -> None:
    model = get_peft_model(nets.net(), CONFIG)
    model.delete_adapter("default")
    assert model.active_adapter == []
    with pytest.raises(StateError, match=r"no adapter is active"):
        _ = model.active_peft_config
    with pytest.raises(StateError, match=r"has no adapters"):
        model.save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(AdapterNameError, match="There are: none"):
        model.set_adapter("default")


def test_t22_deleting_the_active_one_of_several_activates_another_and_says_so() -> None:
    model = model_with()
    with pytest.warns(MultigraftWarning, match="`a` was the active adapter; `b` is active now"):
        model.delete_adapter("a")
    assert model.active_adapters == ["b"]


def test_t22_deleting_one_of_two_active_ones_leaves_the_other_active() -> None:
    model = model_with()
    model.set_adapter(["a", "b"])
    model.delete_adapter("a")
    assert model.active_adapters == ["b"]


def test_t22_a_causal_lm_generates_after_the_last_deletion() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=17, **sizes, **heads)).eval()
    ids = torch.tensor([[1, 2, 3]])
    config = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules="all-linear")
    before = llama(input_ids=ids).logits
    model = get_peft_model(llama, config)
    model.delete_adapter("default")
    assert nets.same_bits(model(input_ids=ids).logits, before)
    assert model.generate(input_ids=ids, max_new_tokens=2, do_sample=False).shape == (1, 5)


@pytest.mark.parametrize("how", ["set_adapter", "set_requires_grad", "train"])
def test_t12_making_a_merged_adapter_trainable_warns_that_it_gets_no_gradient(how: str) -> None:
    model = model_with()
    model.merge_adapter(["a"])
    with pytest.warns(MultigraftWarning, match=r"\['a'\] are merged.*no gradient.*unmerge_adapter"):
        if how == "set_adapter":
            model.set_adapter("a")
        elif how == "set_requires_grad":
            model.base_model.set_requires_grad(["a", "b"])
        else:
            model.train()
    assert model.get_base_model().training == (how == "train")
    assert nets.layer(model, "conv").merged_adapters == ["a"]


@pytest.mark.parametrize("how", ["inference_mode", "freeze", "eval", "other", "frozen"])
def test_t12_a_merged_adapter_that_is_not_trained_gives_no_warning(
    how: str, recwarn: pytest.WarningsRecorder
) -> None:
    model = model_with(trains=how != "frozen")
    model.merge_adapter(["a"])
    if how == "inference_mode":
        model.set_adapter(["a", "b"], inference_mode=True)
    elif how == "freeze":
        model.base_model.set_requires_grad("a", False)
    elif how == "other":
        model.base_model.set_requires_grad("b", True)
    elif how == "eval":
        model.eval()
    else:
        model.train()
    assert not recwarn.list
