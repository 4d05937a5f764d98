"""The roster: one per base model, and nobody is changed unless all can be."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from multigraft import AdapterNameError, PeftModel, StateError, get_peft_model
from multigraft.roster import Roster
from multigraft.routing import Route
from tests.subject import Subject, layers


@pytest.fixture
def subject() -> Subject:
    return Subject()


@pytest.fixture
def model(subject: Subject) -> PeftModel:
    """`a` on all linear layers, `b` on the head alone."""
    model = get_peft_model(subject.base, subject.config(), "a")
    model.add_adapter("b", subject.config(["head"]))
    return model


def test_every_handle_of_a_model_has_the_same_roster(model: PeftModel) -> None:
    base = model.get_base_model()
    assert Roster.of(base) is PeftModel(base, None).roster is model.roster
    assert {id(layer.roster) for layer in layers(base)} == {id(model.roster)}


def test_a_roster_that_nobody_holds_goes_with_its_model() -> None:
    root = nn.Linear(2, 2)
    roster = Roster.of(root)
    seen = [weakref.ref(root), weakref.ref(roster)]
    del root, roster
    gc.collect()
    assert [ref() for ref in seen] == [None, None]


def test_a_copied_model_has_a_roster_of_its_own(model: PeftModel) -> None:
    twin = copy.deepcopy(model)
    twin.set_adapter("b")
    assert (model.active_adapters, twin.active_adapters) == (["a"], ["b"])
    assert Roster.of(twin.get_base_model()) is twin.roster is not model.roster
    assert twin.roster.root is twin.get_base_model()


def test_an_adapter_knows_its_own_layers_and_no_others(model: PeftModel) -> None:
    assert [layer.path for layer in model.roster.touched(["b"])] == ["head"]
    assert len(model.roster.touched(["a", "b"])) == 5


def test_names_may_be_one_or_several_and_repeat(model: PeftModel) -> None:
    assert model.roster.require("a") == ["a"]
    assert model.roster.require(("b", "a", "b")) == ["b", "a"]


@pytest.mark.parametrize("names", ["c", ["a", "c"], [None], 3, b"a"])
def test_an_absent_name_is_refused_with_all_there_are(model: PeftModel, names: object) -> None:
    with pytest.raises(AdapterNameError, match="There are: `a`, `b`"):
        model.roster.require(names)  # type: ignore[arg-type]


def test_active_adapters_that_cannot_stand_together_change_nothing(subject: Subject) -> None:
    options = {"modules_to_save": ["conv"]}
    model = get_peft_model(subject.base, subject.config(["head"], **options), "a")
    model.add_adapter("b", subject.config(["head"], **options))
    plans = [layer.plan for layer in layers(subject.base)]
    with pytest.raises(StateError, match=r"conv: adapters `a`, `b` each hold a trained copy"):
        model.roster.set_active(["a", "b"])
    assert model.roster.active == ("a",)
    assert all(layer.plan is p for layer, p in zip(layers(subject.base), plans, strict=True))


def test_only_layers_of_what_was_and_is_active_are_planned_anew(model: PeftModel) -> None:
    model.set_adapter("b")
    before = {layer.path: layer.plan for layer in layers(model.get_base_model())}
    model.roster.set_active(["b"])
    changed = [x.path for x in layers(model.get_base_model()) if x.plan is not before[x.path]]
    assert changed == ["head"]


def test_flags_of_one_adapter_say_nothing_about_another(model: PeftModel) -> None:
    model.roster.set_requires_grad(["a"], False)
    model.roster.set_requires_grad(["b"], True)
    assert [model.roster.trains(n) for n in ("a", "b")] == [False, True]
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_" not in n)


def test_a_route_lasts_as_long_as_its_block_whatever_happens_in_it(model: PeftModel) -> None:
    route = Route(["a"])
    with pytest.raises(RuntimeError, match="boom"), model.roster.routed(route):
        assert model.roster.route is route
        raise RuntimeError("boom")
    assert model.roster.route is None


def test_without_adapters_what_needs_one_says_so() -> None:
    roster = Roster.of(nn.Linear(2, 2))
    with pytest.raises(StateError, match="Linear has no adapters"):
        roster.names()
    with pytest.raises(StateError, match=r"no adapter is active.*There are: none"):
        _ = roster.first_active


def test_disabled_adapters_are_active_and_do_not_act(model: PeftModel) -> None:
    with model.disable_adapter():
        assert model.roster.active == ("a",)
        assert model.roster.acting() == ()
        assert not model.roster.acts("a")
    assert model.roster.acts("a")
    assert not model.roster.acts("b")


def test_merged_adapters_are_read_from_the_layers(model: PeftModel) -> None:
    model.base_model.merge_adapter(["b"])
    assert model.roster.merged == ["b"]
    with torch.no_grad():
        model.base_model.unmerge_adapter()
    assert model.roster.merged == []
