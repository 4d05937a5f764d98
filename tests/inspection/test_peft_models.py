"""Models that PEFT adapted: their structure is shown, their nests and other breaches are found."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings

import peft
import pytest
import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn

from multigraft import inspect, verify
from tests.inspection.test_verify import breaches, layer_at, llama, notes, trained
from tests.subject import Net

PREFIX = "base_model.model."


def adapted(target: object = ("up", "head"), **options: object):
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=target, **{"r": 2, **options})  # type: ignore[arg-type]
    return peft.get_peft_model(Net(), config, adapter_name="a")


def wrapped(layer: nn.Module, adapter: str) -> PeftLinear:
    """The layer in a LoRA wrapper of PEFT's, as its injection makes it."""
    config = peft.LoraConfig(r=2)
    return PeftLinear(layer, adapter, config=config, r=2, lora_alpha=2)


def nest_in_base(model) -> nn.Module:
    """`b` around `a`'s wrapper: the base layer of the outer one is a wrapper."""
    layer_at(model, "layers.0").up = wrapped(layer_at(model, "layers.0.up"), "b")
    return model


def nest_in_adapter(model) -> nn.Module:
    """`b` on `a`'s own low-rank layer, which is linear too."""
    group = layer_at(model, "layers.0.up").lora_A
    group["a"] = wrapped(group["a"], "b")
    return model


def nest_in_saved_module() -> nn.Module:
    """What PEFT 0.21.2 builds of itself: "all-linear" reaches into a trained copy."""
    model = adapted(["up"], modules_to_save=["head"])
    model.add_adapter("b", peft.LoraConfig(target_modules="all-linear", r=2))
    return model


# Structure.


def test_the_adapters_of_a_peft_model_are_shown_side_by_side():
    model = adapted(modules_to_save=["conv"])
    model.add_adapter("b", peft.LoraConfig(target_modules=["up"], r=4, lora_alpha=2))
    structure = inspect(model)
    assert (structure.base, structure.adapters, structure.nested) == ("Net", ("a", "b"), ())
    assert structure.base_parameters == sum(p.numel() for p in Net().parameters())
    groups = {group.pattern: group for group in structure.groups}
    assert set(groups) == {"layers.{0..1}.up", "conv", "head"}
    a, b = groups["layers.{0..1}.up"].adapters
    assert (a.name, a.method, a.rank, a.scaling, a.parameters) == ("a", "LORA", 2, 4.0, 160)
    assert (b.name, b.method, b.rank, b.scaling, b.parameters) == ("b", "LORA", 4, 0.5, 320)
    assert (a.is_active, a.is_trainable, b.is_active) == (True, True, False)
    assert [x.method for x in groups["conv"].adapters] == ["SAVED_MODULE"]


def test_the_state_is_that_of_the_layers():
    model = adapted(["up"])
    model.merge_adapter()
    (group,) = inspect(model).groups
    assert group.adapters[0].is_merged
    model.unmerge_adapter()
    model.base_model.disable_adapter_layers()
    (group,) = inspect(model).groups
    assert (group.adapters[0].is_merged, group.adapters[0].is_active) == (False, False)


@pytest.mark.parametrize(
    ("config", "method"),
    [
        (peft.IA3Config(target_modules=["up"], feedforward_modules=[]), "IA3"),
        (peft.OFTConfig(target_modules=["up"], oft_block_size=4), "OFT"),
        (peft.VeraConfig(target_modules=["up"], r=2), "VERA"),
        (peft.LoHaConfig(target_modules=["up"], r=2), "LOHA"),
        (peft.TrainableTokensConfig(target_modules=["emb"], token_indices=[1]), "TRAINABLE_TOKENS"),
        (peft.LNTuningConfig(target_modules=["norm"]), "LN_TUNING"),
    ],
)
def test_other_methods_have_their_names_and_are_clean(config, method):
    model = peft.get_peft_model(Net(), config)
    assert {a.method for s in inspect(model).sites for a in s.adapters} == {method}
    assert verify(model).is_clean, verify(model)


def test_trained_tokens_beside_lora_hang_at_the_embedding_itself():
    model = adapted(["up"], trainable_token_indices={"emb": [1, 2]})
    (site,) = (s for s in inspect(model).sites if s.path == "emb")
    assert [(a.method, a.parameters) for a in site.adapters] == [("TRAINABLE_TOKENS", 32)]


def test_a_model_that_was_injected_into_is_shown_the_same():
    config = peft.LoraConfig(target_modules=["up", "head"], r=2)
    injected = peft.inject_adapter_in_model(config, Net(), adapter_name="a")
    assert inspect(injected) == inspect(adapted())


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_wrappers_of_torch_are_seen_through(wrap):
    model = trained(nest_in_base(adapted()))
    structure = inspect(wrap(model))
    assert structure.sites == inspect(model).sites
    (path,) = structure.nested
    assert wrap(model).get_submodule(path) is model.get_submodule(inspect(model).nested[0])
    assert len(verify(wrap(model)).violations) == len(verify(model).violations)


def test_prompts_stand_in_the_context():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(llama(tied=False).unload(), config)
    (context,) = inspect(model).contexts
    assert (context.name, context.method, context.parameters) == ("default", "PROMPT_TUNING", 24)
    assert verify(model).is_clean


# Nests.


@pytest.mark.parametrize(
    ("make", "at", "site"),
    [
        (lambda: nest_in_base(adapted()), ["layers.0.up.base_layer"], "layers.0.up"),
        (lambda: nest_in_adapter(adapted()), ["layers.0.up.lora_A.a"], "layers.0.up"),
        (nest_in_saved_module, ["head.original_module", "head.modules_to_save.a"], "head"),
    ],
)
def test_a_nest_is_shown_and_reported(make, at, site):
    model = make()
    structure = inspect(model)
    assert structure.nested == tuple(PREFIX + path for path in at)
    (outer,) = (s for s in structure.sites if s.path == site)
    assert [f"{site}.{inner.path}" for inner in outer.inside] == at
    assert all(inner.is_nested for inner in outer.inside)
    assert str(structure).count("NESTED ") == len(at)
    found = {path for law, path in breaches(model) if law == "nested wrappers"}
    assert found == set(at)


def test_a_nest_has_a_remedy_and_says_whose_it_is():
    (found,) = (v for v in verify(nest_in_base(adapted())).violations if v.law == "nested wrappers")
    assert "`a` lies inside another adapter's wrapper, in its base layer" in found.problem
    assert "Load the base model afresh" in found.remedy


def test_nests_are_folded_like_sites():
    model = adapted(["up"])
    for block in layer_at(model, "layers"):
        block.up = wrapped(block.up, "b")
    (group,) = inspect(model).groups
    assert group.pattern == "layers.{0..1}.up"
    assert [(x.pattern, x.is_nested) for x in group.inside] == [("base_layer", True)]


def test_a_handle_of_a_handle_is_reported():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(target_modules=["up"])
        model = peft.get_peft_model(adapted(["up"]), config, adapter_name="b")
    assert {v.law for v in verify(model).violations} == {"nested handles"}
    assert [g.pattern for g in inspect(model).groups] == ["layers.{0..1}.up"]
    assert ("nested handles", "base_model.model") in {
        (v.law, v.path) for v in verify(model).violations
    }


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)


class Stack(nn.Module):
    """A module with fused weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.ones(4, 3, 3)), nn.Parameter(torch.ones(4, 3, 3))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Stack()


@pytest.mark.parametrize(
    ("base", "config"),
    [
        (Attention, peft.LoraConfig(target_modules=["attention"], r=2)),
        (Experts, peft.LoraConfig(target_parameters=["experts.up", "experts.down"], r=2)),
    ],
)
def test_wrappers_that_peft_stacks_for_one_adapter_are_no_nest(base, config):
    model = peft.get_peft_model(base(), config)
    structure = inspect(model)
    assert [len(site.inside) for site in structure.sites] == [1]
    assert structure.is_flat
    assert "NESTED" not in str(structure)
    assert verify(model).is_clean, verify(model)


# Other breaches.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target": "all-linear"},
        {"target": r".*\.up"},
        {"target": ["up"], "modules_to_save": ["head"]},
        {"target": ["emb", "conv"]},
        {"target": ["up"], "bias": "all"},
        {"target": ["up"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target": ["up", "down"], "exclude_modules": ["layers.0.up"]},
        {"target": ["up"], "use_dora": True},
    ],
)
def test_a_peft_model_that_is_whole_is_clean(options):
    report = verify(trained(adapted(**options)))
    assert (report.violations, report.notes) == ((), ()), report


def test_a_base_layer_that_trains():
    model = trained(adapted())
    layer_at(model, "head").base_layer.weight.requires_grad_(True)
    assert breaches(model) == {("trainable base", "head")}


def test_a_site_that_the_config_means_and_the_adapter_lacks():
    model = trained(adapted())
    layer_at(model, "layers.1").up = layer_at(model, "layers.1.up").base_layer
    assert breaches(model) == {("uncovered sites", "layers.1.up")}


def test_a_shared_module_that_is_adapted_in_one_place():
    model = trained(adapted(["layers.0.up"]))
    layer_at(model, "layers.1").up = layer_at(model, "layers.0.up").base_layer
    assert breaches(model) == {("shared module", "layers.1.up")}


def test_a_tied_head_beside_an_adapted_embedding():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=2, target_modules=["embed_tokens"])
        model = trained(peft.get_peft_model(llama(tied=True).unload(), config))
    assert breaches(model) == {("shared weight", "model.embed_tokens")}


def test_an_active_adapter_beside_a_merged_one_does_not_act():
    model = adapted(["up"])
    model.add_adapter("b", peft.LoraConfig(target_modules=["up"], r=2))
    trained(model).base_model.set_adapter(["a", "b"])
    model.requires_grad_(False)
    model.merge_adapter(["a"])
    assert breaches(model) == {("merged and active", f"layers.{n}.up") for n in range(2)}


def test_an_adapter_that_is_merged_and_not_active():
    model = adapted(["head"])
    model.add_adapter("b", peft.LoraConfig(target_modules=["head"], r=2))
    trained(model).merge_adapter(["a"])
    layer_at(model, "head")._active_adapter = ["b"]
    problems = [v.problem for v in verify(model).violations]
    assert any("is merged, so it acts, but is not active" in problem for problem in problems)


def test_an_adapter_that_is_merged_in_part():
    model = trained(adapted(["up"])).requires_grad_(False)
    layer_at(model, "layers.0.up").merge()
    assert breaches(model) == {("half merged", "layers.1.up")}


def test_values_and_sizes_are_looked_at():
    model = trained(adapted())
    layer_at(model, "head").scaling["a"] = 1e4
    nn.init.zeros_(layer_at(model, "layers.0.up").lora_B["a"].weight)
    assert notes(model) == {("oversized adapters", "head"), ("dead adapters", "layers.0.up")}
    nn.init.constant_(layer_at(model, "layers.1.up").lora_B["a"].weight, float("nan"))
    assert breaches(model) == {("non-finite values", "layers.1.up.lora_B.a.weight")}


def test_inspecting_a_peft_model_changes_nothing():
    model = trained(nest_in_saved_module())
    before = copy.deepcopy(model.state_dict())
    inspect(model), verify(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_peft_is_not_imported_to_ask():
    code = (
        "import sys, torch, multigraft as m\n"
        "model = m.get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)),"
        " m.LoraConfig(target_modules=['0']))\n"
        "str(m.inspect(model)), str(m.verify(model))\n"
        "assert 'peft' not in sys.modules and 'rich' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
