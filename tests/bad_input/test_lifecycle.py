"""Operations that the present state forbids: refused or warned of; the model stays as it was."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from multigraft import (
    AdapterNameError,
    ConfigError,
    LoraConfig,
    MergeError,
    MultigraftError,
    MultigraftWarning,
    PeftModel,
    StateError,
    UnsupportedError,
    get_peft_model,
    inject_adapter_in_model,
)
from tests.bad_input.refusals import CONFIG, IDS, Operation, model_of, refused
from tests.weaknesses import nets

SAVED = LoraConfig(r=2, target_modules=["up"], modules_to_save=["head"])

# Merging and unmerging.

MERGE: dict[str, tuple[str, Operation, str]] = {
    "merge what is merged": (
        "a",
        lambda m: m.merge_adapter(["a"]),
        "adapters ['a'] are merged already; unmerge_adapter() takes them out",
    ),
    "merge one that is and one that is not": (
        "a",
        lambda m: m.merge_adapter(["b", "a"]),
        "adapters ['a'] are merged already",
    ),
    "unmerge what is not merged": (
        "",
        lambda m: m.unmerge_adapter(["a"]),
        "adapters ['a'] are not merged; merged are none",
    ),
    "unmerge one that is and one that is not": (
        "a",
        lambda m: m.unmerge_adapter(["a", "b"]),
        "adapters ['b'] are not merged; merged are ['a']",
    ),
    "scale a merged one": (
        "a",
        lambda m: nets.layer(m, "head").set_scale("a", 2.0),
        "head: the scaling of `a` cannot change while it is merged into the base. Call unmerge",
    ),
    "assign a merged one's scaling": (
        "ab",
        lambda m: nets.layer(m, "blocks.1.up").scaling.update(b=3.0),
        "blocks.1.up: the scaling of `b` cannot change while it is merged",
    ),
}


@pytest.mark.parametrize("case", MERGE)
def test_a_step_that_the_merged_state_forbids_is_refused(case: str) -> None:
    merged, operation, message = MERGE[case]
    model = model_of(merged)
    assert message in refused(StateError, model, operation)


def test_scaling_the_active_adapters_of_which_one_is_merged_scales_none() -> None:
    model = model_of("b")
    with pytest.warns(MultigraftWarning, match="get no gradient"):
        model.set_adapter(["a", "b"])
    message = refused(StateError, model, lambda m: nets.layer(m, "head").scale_layer(2.0))
    assert "head: the scaling of `b` cannot change while it is merged" in message


@pytest.mark.parametrize("again", [lambda m: m.merge_adapter(), lambda m: m.merge_adapter(None)])
def test_merging_the_active_adapters_twice_warns_and_adds_nothing(again: Operation) -> None:
    model = model_of("a")
    facts = nets.known(model)
    with pytest.warns(MultigraftWarning, match="no active adapter is left to merge"):
        again(model)
    nets.assert_as_before(model, facts)


def test_unmerging_when_nothing_is_merged_warns_and_changes_nothing() -> None:
    model = model_of()
    facts = nets.known(model)
    with pytest.warns(MultigraftWarning, match="no adapter is merged; nothing to do"):
        model.unmerge_adapter()
    nets.assert_as_before(model, facts)


@pytest.mark.parametrize("inactive", [True, False])
def test_merging_away_no_adapter_at_all_warns_that_nothing_was_merged(inactive: bool) -> None:
    model, bits = model_of(), nets.base_bits(nets.net())
    if inactive:
        model.set_adapter([])
    with pytest.warns(MultigraftWarning, match="none is merged: the base comes back as it was"):
        base = model.merge_and_unload(adapter_names=None if inactive else [])
    nets.assert_bits(base, bits)


BROKEN = [
    ("lora_A", math.nan, False),
    ("lora_B", math.inf, False),
    ("lora_A", -math.inf, True),
]


@pytest.mark.parametrize(("group", "value", "safe"), BROKEN)
@pytest.mark.parametrize("away", [True, False])
def test_merging_what_is_not_finite_is_refused_and_named(
    group: str, value: float, safe: bool, away: bool
) -> None:
    model = model_of("b")
    getattr(nets.layer(model, "head"), group)["a"].weight.data[0, 0] = value
    facts = nets.known(model)
    with pytest.raises(MergeError) as caught:
        if away:
            model.merge_and_unload(safe_merge=safe)
        else:
            model.merge_adapter(safe_merge=safe)
    assert f"head: `{group}.weight` of `a` holds NaN or infinity" in str(caught.value)
    assert isinstance(caught.value, ValueError)
    nets.assert_as_before(model, facts)


def test_a_safe_merge_whose_sum_overflows_is_refused() -> None:
    model = model_of()
    nets.layer(model, "head").lora_A["a"].weight.data.fill_(1e30)
    nets.layer(model, "head").lora_B["a"].weight.data.fill_(1e30)
    facts = nets.known(model)
    with pytest.raises(MergeError, match=r"head: merging \['a'\] gives NaN or infinity in `weight"):
        model.merge_adapter(safe_merge=True)
    nets.assert_as_before(model, facts)


# While adapters are disabled.

DISABLED: dict[str, tuple[str, Operation, str]] = {
    "merge": ("", lambda m: m.merge_adapter(), "leave disable_adapter() before merging"),
    "merge by name": ("a", lambda m: m.merge_adapter(["b"]), "leave disable_adapter() before"),
    "unmerge": ("a", lambda m: m.unmerge_adapter(), "leave disable_adapter() before unmerging"),
    "merge away": ("a", lambda m: m.merge_and_unload(), "leave disable_adapter() before merging"),
    "unload": ("a", lambda m: m.unload(), "leave disable_adapter() before unmerging"),
    "delete": ("ab", lambda m: m.delete_adapter("a"), "leave disable_adapter() before unmerging"),
    "activate another": (
        "a",
        lambda m: m.set_adapter("b"),
        "adapters ['a'] are merged and not among ['b'], and cannot be unmerged while adapters are",
    ),
}


@pytest.mark.parametrize("case", DISABLED)
def test_a_step_that_disabling_forbids_is_refused_and_enabling_gives_all_back(case: str) -> None:
    merged, operation, message = DISABLED[case]
    model = model_of(merged)
    facts, output = nets.known(model), model(IDS).detach()
    with model.disable_adapter():
        assert message in refused(StateError, model, operation)
    nets.assert_as_before(model, facts)
    assert torch.equal(model(IDS), output)


def test_disabling_what_cannot_be_taken_out_is_refused() -> None:
    model = model_of()
    model.base_model.merge_adapter(keep_original=False)
    facts = nets.known(model)
    with (
        pytest.raises(StateError, match="merged with keep_original=False"),
        model.disable_adapter(),
    ):
        pass
    nets.assert_as_before(model, facts)


# Training what is merged.

TRAINING: dict[str, Operation] = {
    "set_adapter": lambda m: m.set_adapter("a"),
    "set_adapter of both": lambda m: m.set_adapter(["a", "b"]),
    "set_requires_grad": lambda m: m.base_model.set_requires_grad("a"),
    "train": lambda m: m.train(),
}


@pytest.mark.parametrize("how", TRAINING)
def test_making_a_merged_adapter_trainable_warns_once_with_the_remedy(how: str) -> None:
    model = model_of("a")
    with pytest.warns(MultigraftWarning) as caught:
        TRAINING[how](model)
    (warning,) = caught
    assert "adapters ['a'] are merged into the base: they get no gradient" in str(warning.message)
    assert "Call unmerge_adapter() first" in str(warning.message)
    assert model.base_model.roster.merged == ["a"]


# Names of sets of adapters that cannot act together.


@pytest.mark.parametrize("how", ["set_adapter", "merge", "merge the other"])
def test_two_trained_copies_of_one_module_are_refused_together(how: str) -> None:
    model = model_of(config=SAVED)
    operations: dict[str, Operation] = {
        "set_adapter": lambda m: m.set_adapter(["a", "b"]),
        "merge": lambda m: m.merge_adapter(["a", "b"]),
        "merge the other": lambda m: m.merge_adapter(["b"]),
    }
    message = refused(StateError, model, operations[how])
    assert "head: adapters" in message
    assert "each hold a trained copy of this module (`modules_to_save`)" in message


# Scalings.

SCALINGS: list[tuple[Operation, type[MultigraftError], str]] = [
    (lambda m: nets.layer(m, "head").set_scale("z", 1.0), AdapterNameError, "called `z`"),
    (lambda m: nets.layer(m, "head").set_scale("a", math.nan), ConfigError, "(=nan) must be a"),
    (lambda m: nets.layer(m, "head").set_scale("a", "2"), ConfigError, "(='2') must be a finite"),
    (lambda m: nets.layer(m, "head").scale_layer(math.inf), ConfigError, "(=inf) must be a"),
    (lambda m: nets.layer(m, "head").unscale_layer(0), StateError, "(=0) cannot be divided by"),
    (lambda m: nets.layer(m, "up2").scaling.update(a=1.0), AdapterNameError, "no scaling here"),
    (lambda m: nets.layer(m, "head").scaling.update(z=1.0), AdapterNameError, "called `z`"),
    (lambda m: nets.layer(m, "head").scaling.pop("a"), AdapterNameError, "delete_adapter(name)"),
]


@pytest.mark.parametrize(("operation", "error", "message"), SCALINGS)
def test_a_scaling_that_cannot_be_set_is_refused(
    operation: Operation, error: type[MultigraftError], message: str
) -> None:
    base = nets.net()
    base.up2 = nn.Linear(2, 2)
    model = get_peft_model(base, CONFIG, adapter_name="a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["up2"]))
    nets.train_by_hand(model, "a", "b")
    assert message in refused(error, model, operation)


# Deletion, and what is left after it.


@pytest.mark.parametrize("name", ["a", "b"])
def test_deleting_twice_is_refused(name: str) -> None:
    model = model_of()
    context: Any = pytest.warns(MultigraftWarning, match="active now") if name == "a" else None
    with context or nullcontext():
        model.delete_adapter(name)
    message = refused(AdapterNameError, model, lambda m: m.delete_adapter(name))
    assert f"no adapter is called `{name}`" in message


@pytest.mark.parametrize("attribute", ["active_peft_config", "peft_type"])
def test_what_needs_an_active_adapter_says_that_there_is_none(attribute: str) -> None:
    model = model_of()
    model.set_adapter([])
    with pytest.raises(StateError, match=r"no adapter is active; set_adapter.*There are: `a`, `b`"):
        getattr(model, attribute)


# What is no model, no config.


@pytest.mark.parametrize("config", [None, "LORA", {"r": 2}, LoraConfig], ids=repr)
@pytest.mark.parametrize("how", ["get_peft_model", "add_adapter", "inject"])
def test_what_is_no_config_is_refused_with_what_is(how: str, config: Any) -> None:
    operations: dict[str, Operation] = {
        "get_peft_model": lambda m: get_peft_model(m, config, adapter_name="c"),
        "add_adapter": lambda m: m.add_adapter("c", config),
        "inject": lambda m: inject_adapter_in_model(config, m, adapter_name="c"),
    }
    message = refused(UnsupportedError, model_of(), operations[how])
    assert f"`peft_config` (={type(config).__name__}) must be a config of Multigraft" in message


@pytest.mark.parametrize("model", [None, "org/model", 3, nn.Linear], ids=repr)
def test_what_is_no_model_is_refused(model: Any) -> None:
    for call in (
        lambda: get_peft_model(model, CONFIG),
        lambda: inject_adapter_in_model(CONFIG, model),
        lambda: PeftModel(model, CONFIG),
    ):
        with pytest.raises(UnsupportedError, match=r"`model` \(=.*\) must be a torch\.nn\.Module"):
            call()
