"""Every law is checked: each breach, made by hand, is found, and models that keep it are clean."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import multigraft
from multigraft import (
    IA3Config,
    LoraConfig,
    OFTConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
    inject_adapter_in_model,
    verify,
)
from multigraft.inspection.checks import CHECKS
from multigraft.merge import merged_value
from tests.contracts.at_work import attach
from tests.contracts.laws import is_supported
from tests.contracts.pairs import pairs, rows
from tests.subject import Net


def trained(model: nn.Module) -> nn.Module:
    """A model whose adapters all do something, as training leaves them."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_A", "lora_B", "lora_embedding", "tokens_delta")):
            parameter.data += torch.randn_like(parameter) * 0.05
    return model


def net(target: object = ("up", "head"), **options: object):
    torch.manual_seed(0)
    config = LoraConfig(target_modules=target, **{"r": 2, **options})  # type: ignore[arg-type]
    model = get_peft_model(Net(), config, adapter_name="a")
    model.add_adapter("b", LoraConfig(r=4, target_modules=["up"]))
    return trained(model)


def llama(*, tied: bool, target: object = ("q_proj",)):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.5,
        tie_word_embeddings=tied,
    )
    chosen = LoraConfig(r=2, target_modules=list(target), task_type="CAUSAL_LM")  # type: ignore[call-overload]
    return get_peft_model(LlamaForCausalLM(config), chosen)


def layer_at(model: nn.Module, path: str):
    return model.get_submodule(f"base_model.model.{path}")


def breaches(model: nn.Module) -> set[tuple[str, str]]:
    return {(v.law, v.path.removeprefix("base_model.model.")) for v in verify(model).violations}


def notes(model: nn.Module) -> set[tuple[str, str]]:
    return {(v.law, v.path.removeprefix("base_model.model.")) for v in verify(model).notes}


# Models that keep the laws.


def disabled(model):
    model.base_model.disable_adapter_layers()
    return model


def merged(model):
    model.eval().requires_grad_(False)
    model.merge_adapter()
    return model


@pytest.mark.parametrize(
    "make",
    [
        net,
        lambda: net(["up"], modules_to_save=["head"]),
        lambda: net(["up", "emb", "conv"], bias="all"),
        lambda: net("all-linear", use_dora=True),
        lambda: net(["up"], trainable_token_indices={"emb": [1, 2]}),
        lambda: merged(net()),
        lambda: disabled(net()),
        lambda: net().base_model.model,
        lambda: trained(inject_adapter_in_model(LoraConfig(target_modules=["up"]), Net())),
        lambda: trained(llama(tied=True)),
        lambda: trained(llama(tied=False, target=["embed_tokens", "q_proj"])),
        lambda: nn.Sequential(nn.Linear(2, 2)),
    ],
)
def test_a_model_that_keeps_the_laws_has_neither_violations_nor_notes(make):
    report = verify(make())
    assert report.is_clean, report
    assert not report.notes, report


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["up", "down"], feedforward_modules=["down"]),
        OFTConfig(target_modules=["up"], oft_block_size=4),
        VeraConfig(target_modules=["up"], r=2),
    ],
)
def test_other_methods_are_clean_from_the_start(config):
    assert verify(get_peft_model(Net(), config)).is_clean


def test_an_adapter_of_the_context_is_clean():
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = get_peft_model(llama(tied=False).unload(), config)
    assert verify(model).is_clean


def test_a_half_precision_base_under_float32_adapters_is_clean():
    torch.manual_seed(0)
    model = get_peft_model(Net().bfloat16(), LoraConfig(target_modules=["up"]))
    assert verify(trained(model)).is_clean


def test_verifying_changes_nothing():
    model = net()
    before = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    verify(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.parametrize("method", sorted({method for method, _ in rows()}))
def test_every_method_on_every_layer_in_every_storage_is_clean(method):
    chosen = [pair for pair in pairs(method) if is_supported(pair)]
    assert chosen
    for pair in chosen:
        model = attach(pair)
        report = verify(model)
        assert report.is_clean, f"{pair}: {report}"
        assert {note.law for note in report.notes} <= {"oversized adapters"}, f"{pair}: {report}"
        assert multigraft.inspect(model).parameters_of("a") > 0


# Each breach.


def test_a_wrapper_in_a_wrapper():
    model = net()
    outer = layer_at(model, "layers.0.up")
    outer.base_layer.add_module("inside", layer_at(model, "layers.1.up"))
    assert ("nested wrappers", "layers.0.up.base_layer.inside") in breaches(model)


def test_a_base_layer_that_trains():
    model = net()
    layer_at(model, "head").base_layer.weight.requires_grad_(True)
    assert breaches(model) == {("trainable base", "head")}


def test_a_layer_that_lost_its_adapter():
    model = net()
    layer_at(model, "layers.1.up").remove("b")
    assert breaches(model) == {("uncovered sites", "layers.1.up")}


def test_a_layer_that_was_taken_out_of_the_model():
    model = net()
    block = layer_at(model, "layers.1")
    block.up = block.up.base_layer
    assert breaches(model) == {("uncovered sites", "layers.1.up")}


def test_a_layer_that_came_after_the_adapter():
    model = net(["up"])
    model.delete_adapter("b")
    layer_at(model, "layers").append(copy.deepcopy(Net().layers[0]))
    assert breaches(model) == {("uncovered sites", "layers.2.up")}


def test_one_module_in_two_places_with_one_adapted():
    model = net(["up"])
    layer_at(model, "layers.1").down = layer_at(model, "layers.0.up").base_layer
    assert ("shared module", "layers.1.down") in breaches(model)


def test_a_tied_head_beside_an_adapted_embedding_is_a_note():
    model = trained(llama(tied=True, target=["embed_tokens"]))
    assert breaches(model) == set()
    assert notes(model) == {("shared weight", "model.embed_tokens")}


def test_tied_embeddings_that_were_torn_apart():
    model = trained(llama(tied=True))
    head = layer_at(model, "lm_head")
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    assert breaches(model) == {("torn ties", "lm_head")}


def test_an_adapter_that_is_merged_in_part():
    model = net(["up"])
    model.requires_grad_(False)
    model.merge_adapter(["a"])
    layer = layer_at(model, "layers.1.up")
    layer.merged_grafts = []
    assert breaches(model) == {("half merged", "layers.1.up")}


def test_an_adapter_that_is_merged_and_acts_as_well():
    model = net(["up"])
    model.requires_grad_(False)
    model.merge_adapter(["a"])
    layer = layer_at(model, "layers.1.up")
    layer.plan = layer.plan_for(["a"], [])
    assert breaches(model) == {("merged and active", "layers.1.up")}


def test_a_merged_adapter_that_is_trainable_is_a_note():
    model = net(["head"])
    model.merge_adapter(["a"])
    assert breaches(model) == set()
    assert notes(model) == {("merged and active", "head")}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["layers.0.up.lora_B.a.weight", "conv.weight"])
def test_a_value_that_is_not_finite(name, value):
    model = net()
    with torch.no_grad():
        model.get_parameter(f"base_model.model.{name}").view(-1)[0] = value
    assert breaches(model) == {("non-finite values", name)}


def test_a_value_that_is_not_finite_in_an_8_bit_float():
    weight = torch.full((2, 2), float("nan")).to(torch.float8_e4m3fn)
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(weight, requires_grad=False)
    assert breaches(model) == {("non-finite values", "weight")}


def test_an_adapter_of_another_dtype_than_its_base():
    model = net(["head"])
    layer_at(model, "head").lora_A.half()
    layer_at(model, "head").lora_B.half()
    assert breaches(model) == {("device or dtype", "head")}


def test_an_adapter_of_two_dtypes():
    model = net(["head"])
    layer_at(model, "head").lora_B.double()
    assert breaches(model) == {("device or dtype", "head")}


def test_an_adapter_that_was_never_loaded():
    model = get_peft_model(Net(), LoraConfig(target_modules=["head"]), low_cpu_mem_usage=True)
    (found,) = verify(model).violations
    assert (found.law, found.path) == ("device or dtype", "base_model.model.head")
    assert "meta" in found.problem


def test_an_adapter_on_another_device_than_its_base():
    model = net(["head"])
    layer_at(model, "head").base_layer.to("meta")
    (found,) = verify(model).violations
    assert (found.law, found.path) == ("device or dtype", "base_model.model.head")
    assert "`a` is on cpu, its base layer on meta" in found.problem


def test_a_site_that_training_did_not_reach_is_a_note():
    model = net()
    nn.init.zeros_(layer_at(model, "head").lora_B["a"].weight)
    assert breaches(model) == set()
    assert notes(model) == {("dead adapters", "head")}


def test_an_adapter_that_adds_nothing_anywhere_is_one_note():
    model = get_peft_model(Net(), LoraConfig(target_modules="all-linear"), adapter_name="new")
    (found,) = verify(model).notes
    assert (found.law, found.path) == ("dead adapters", "base_model.model")
    assert "`new`" in found.problem


def test_a_change_larger_than_the_base_is_a_note():
    model = net()
    layer_at(model, "head").scaling["a"] = 1e4
    assert breaches(model) == set()
    assert notes(model) == {("oversized adapters", "head")}


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_the_size_of_a_change_is_that_of_what_merging_adds(options):
    from multigraft.inspection.checks.values import _delta_norm
    from multigraft.inspection.places import places

    model = net(["head"], **options)
    (place,) = (p for p in places(model) if p.site == "head")
    own = layer_at(model, "head").base_layer.weight.detach()
    delta = merged_value(place.layer, place.layer.grafts["a"], "weight", own) - own
    assert _delta_norm(place.parts[0]) == pytest.approx(float(delta.norm()), rel=1e-4)


# The report.


def test_the_report_folds_repeats_and_names_path_problem_and_remedy():
    model = net()
    for index in range(2):
        layer_at(model, f"layers.{index}.up").base_layer.bias.requires_grad_(True)
    text = str(verify(model))
    assert text == "\n".join(
        [
            "2 violations, no notes",
            "",
            "trainable base at base_model.model.layers.{0..1}.up",
            "  `bias` of the base layer requires gradients: every adapter on it would change.",
            "  Freeze it: requires_grad_(False). To train the whole module, name it in "
            "`modules_to_save`.",
        ]
    )


def test_every_path_leads_to_a_module_or_a_parameter():
    model = net()
    layer_at(model, "head").base_layer.weight.requires_grad_(True)
    (found,) = verify(model).violations
    assert model.get_submodule(found.path) is layer_at(model, "head")


def test_every_check_that_is_registered_is_tried():
    files = [Path(__file__), Path(__file__).with_name("test_peft_models.py")]
    source = "".join(file.read_text(encoding="utf-8") for file in files)
    assert [law for law, _ in CHECKS.items() if f'("{law}", ' not in source] == []


def test_the_functions_are_names_of_the_package():
    assert callable(multigraft.inspect)
    assert callable(multigraft.verify)
