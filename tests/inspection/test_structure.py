"""The structure as data: what is where, folded where alike, and breaches of the law in it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from multigraft import LoraConfig, get_peft_model, inject_adapter_in_model
from multigraft.inspection import inspect
from tests.subject import LINEAR, Net, layers


def base_model() -> Net:
    torch.manual_seed(0)
    return Net()


def config(target: object = "all-linear", **options: object) -> LoraConfig:
    return LoraConfig(target_modules=target, **{"r": 2, **options})  # type: ignore[arg-type]


@pytest.fixture
def model():
    model = get_peft_model(base_model(), config(), adapter_name="a")
    model.add_adapter("b", config(["up", "emb", "conv"], r=4, lora_alpha=2))
    return model


def at(structure, path: str):
    return next(site for site in structure.sites if site.path == path)


def test_a_model_without_adapters_has_no_sites():
    net = base_model()
    structure = inspect(net)
    assert (structure.base, structure.adapters, structure.sites) == ("Net", (), ())
    assert structure.base_parameters == sum(p.numel() for p in net.parameters())
    assert structure.is_flat


def test_every_site_has_its_adapters_and_no_others(model):
    found = {site.path: [a.name for a in site.adapters] for site in inspect(model).sites}
    assert found == {
        **{path: ["a"] for path in LINEAR if not path.endswith("up")},
        **{path: ["a", "b"] for path in LINEAR if path.endswith("up")},
        "emb": ["b"],
        "conv": ["b"],
    }


def test_sites_stand_in_the_models_order(model):
    order = [site.path for site in inspect(model).sites]
    modules = [n for n, _ in model.get_base_model().named_modules() if n in order]
    assert order == modules


def test_the_base_is_counted_without_its_adapters(model):
    assert inspect(model).base_parameters == sum(p.numel() for p in base_model().parameters())


def test_an_adapters_facts_are_those_of_its_config_and_state(model):
    (a, b) = at(inspect(model), "layers.0.up").adapters
    assert (a.method, a.rank, a.scaling, a.parameters) == ("LORA", 2, 4.0, 2 * 16 + 24 * 2)
    assert (b.method, b.rank, b.scaling, b.parameters) == ("LORA", 4, 0.5, 4 * 16 + 24 * 4)
    assert (a.is_active, a.is_trainable, a.is_merged) == (True, True, False)
    assert (b.is_active, b.is_trainable, b.is_merged) == (False, False, False)


def test_it_follows_the_state(model):
    def facts(path: str):
        return [(x.is_active, x.is_merged) for x in at(inspect(model), path).adapters]

    model.set_adapter("b")
    assert facts("layers.0.up") == [(False, False), (True, False)]
    model.merge_adapter()
    assert facts("layers.0.up") == [(False, False), (True, True)]
    model.unmerge_adapter()
    with model.disable_adapter():
        assert facts("layers.0.up") == [(False, False), (False, False)]
    model.delete_adapter("a")
    assert [a.name for a in at(inspect(model), "layers.0.up").adapters] == ["b"]


def test_parts_of_one_adapter_at_a_site_are_one_entry():
    model = get_peft_model(base_model(), config(["up"], bias="lora_only"))
    (adapter,) = at(inspect(model), "layers.0.up").adapters
    assert adapter.method == "LORA+BIAS"
    assert adapter.parameters == 2 * 16 + 24 * 2 + 24


def test_a_saved_module_is_an_adapter_of_its_own_kind():
    model = get_peft_model(base_model(), config(["up"], modules_to_save=["head"]))
    (adapter,) = at(inspect(model), "head").adapters
    assert adapter.parameters == 16 * 5 + 5
    assert adapter.rank == 0


def test_an_adapters_parameters_add_up_over_its_sites(model):
    structure = inspect(model)
    for name in ("a", "b"):
        own = [p for n, p in model.named_parameters() if name in n.split(".")]
        assert structure.parameters_of(name) == sum(p.numel() for p in own)


def test_a_model_adapted_in_place_is_described_the_same(model):
    injected = inject_adapter_in_model(config(), base_model(), adapter_name="a")
    model.delete_adapter("b")
    assert inspect(injected) == inspect(model)


def test_alike_sites_are_folded_and_unlike_ones_are_not(model):
    groups = {group.pattern: group for group in inspect(model).groups}
    assert set(groups) == {"emb", "layers.{0..1}.up", "layers.{0..1}.down", "conv", "head"}
    up = groups["layers.{0..1}.up"]
    assert [site.path for site in up.sites] == ["layers.0.up", "layers.1.up"]
    assert [a.parameters for a in up.adapters] == [160, 320]


def test_sites_whose_adapters_differ_are_not_folded():
    model = get_peft_model(base_model(), config(["up"], rank_pattern={"layers.1.up": 3}))
    assert [g.pattern for g in inspect(model).groups] == ["layers.0.up", "layers.1.up"]


def test_indices_with_gaps_are_listed():
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    model = get_peft_model(net, config(["0", "1", "4"]))
    assert [g.pattern for g in inspect(model).groups] == ["{0,1,4}"]


def test_an_adapted_layer_inside_another_is_named(model):
    outer, inner = layers(model)[:2]
    assert inspect(model).is_flat
    outer.base_layer.add_module("inside", inner)
    structure = inspect(model)
    assert not structure.is_flat
    assert structure.nested == (f"base_model.model.{outer.path}.base_layer.inside",)


def test_describing_changes_nothing(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    inspect(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
