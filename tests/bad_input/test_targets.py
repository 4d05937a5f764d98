"""Targets that mean nothing on this model: refused before anything is touched, with what there is.

Every refusal is tried through every way in, on a plain model and beside an adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from multigraft import (
    LoraConfig,
    PeftModel,
    TargetError,
    get_peft_model,
    inject_adapter_in_model,
)
from tests.weaknesses import nets


def through_get_peft_model(config: LoraConfig) -> tuple[Any, Callable[[], object]]:
    model = nets.net()
    return model, lambda: get_peft_model(model, config)


def through_inject(config: LoraConfig) -> tuple[Any, Callable[[], object]]:
    model = nets.net()
    return model, lambda: inject_adapter_in_model(config, model, "b")


def through_add_adapter(config: LoraConfig) -> tuple[Any, Callable[[], object]]:
    model = get_peft_model(nets.net(), LoraConfig(r=2, target_modules=["up", "head"]))
    return model, lambda: model.add_adapter("b", config)


def beside_a_merged_adapter(config: LoraConfig) -> tuple[Any, Callable[[], object]]:
    model = get_peft_model(nets.net(), LoraConfig(r=2, target_modules=["up", "head"]))
    nets.train_by_hand(model, "default")
    model.merge_adapter()
    return model, lambda: inject_adapter_in_model(config, model, "b")


WAYS = [through_get_peft_model, through_inject, through_add_adapter, beside_a_merged_adapter]
ways = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)

THERE_ARE = "There are: `conv`, `down`, `embed`, `head`, `norm`, `up`."
MEANINGLESS: dict[str, tuple[dict[str, Any], str]] = {
    "a typo": ({"target_modules": ["upp"]}, "no module is called `upp`. Nearest: `up`"),
    "a typo beside a name": (
        {"target_modules": ["up", "donw"]},
        "no module is called `donw`. Nearest: `down`",
    ),
    "two typos": (
        {"target_modules": ["haed", "embbed"]},
        "called `haed`, `embbed`. Nearest: `head`. Nearest: `embed`",
    ),
    "a path that ends too early": (
        {"target_modules": ["block.0.up"]},
        "no module is called `block.0.up`. Nearest: `blocks.0.up`",
    ),
    "a name like none": (
        {"target_modules": ["xyzzy"]},
        f"no module is called `xyzzy`. {THERE_ARE}",
    ),
    "a part of a name": ({"target_modules": ["e"]}, f"no module is called `e`. {THERE_ARE}"),
    "an adapter's tensors": (
        {"target_modules": ["lora_A"]},
        f"no module is called `lora_A`. {THERE_ARE}",
    ),
    "a wrapper's child": (
        {"target_modules": ["up.base_layer"]},
        "no module is called `up.base_layer`",
    ),
    "an expression for a wrapper's child": (
        {"target_modules": r".*base_layer"},
        "(='.*base_layer'): the expression matches no module's whole path",
    ),
    "an expression without a match": (
        {"target_modules": r"blocks\.\d\.out"},
        r"(='blocks\\.\\d\\.out'): the expression matches no module's whole path. There are: "
        "`blocks.0.down`, `blocks.0.up`, `blocks.1.down`, `blocks.1.up` and 4 more",
    ),
    "an expression for the middle of paths": (
        {"target_modules": r"blocks\.0"},
        "LORA cannot adapt blocks.0 (Block): it adapts layers of the kinds",
    ),
    "a name as an expression": (
        {"target_modules": "up"},
        "As a name it must stand in a list: target_modules=['up']",
    ),
    "an empty expression": ({"target_modules": ""}, "(=''): the expression matches no module"),
    "nothing at all": ({"target_modules": []}, "Name modules to adapt, or in `modules_to_save`"),
    "a container": (
        {"target_modules": ["blocks"]},
        "LORA cannot adapt blocks (ModuleList): it adapts layers of the kinds",
    ),
    "everything excluded": (
        {"target_modules": ["up"], "exclude_modules": ["up"]},
        "no module is left to adapt: `target_modules` (=['up']), `exclude_modules` (=['up'])",
    ),
    "everything excluded by an expression": (
        {"target_modules": "all-linear", "exclude_modules": r".*"},
        "`exclude_modules` (='.*')",
    ),
    "everything saved": (
        {"target_modules": ["head"], "modules_to_save": ["head"]},
        "no module is left to adapt: `target_modules` (=['head'])",
    ),
    "an unknown exclusion": (
        {"target_modules": ["up"], "exclude_modules": ["dwon"]},
        "`exclude_modules`: no module is called `dwon`. Nearest: `down`",
    ),
    "an exclusion that excludes nothing": (
        {"target_modules": ["up"], "exclude_modules": r"head\.x"},
        r"`exclude_modules` (='head\\.x'): the expression matches no module's whole path",
    ),
    "an unknown module to save": (
        {"target_modules": ["up"], "modules_to_save": ["haed"]},
        "`modules_to_save`: no module is called `haed`. Nearest: `head`",
    ),
    "a layer that is not there": (
        {"target_modules": ["up"], "layers_to_transform": 2},
        "`layers_to_transform` (=2): there are no layers [2]; there are 0 to 1",
    ),
    "one layer of several that is not there": (
        {"target_modules": ["up"], "layers_to_transform": [0, 7, 9]},
        "(=[0, 7, 9]): there are no layers [7, 9]; there are 0 to 1. Give indices",
    ),
    "a list of layers that is not there": (
        {"target_modules": ["up"], "layers_to_transform": [0], "layers_pattern": "layer"},
        "no layer has an index in `layers_pattern` (='layer')",
    ),
    "modules that lie in no layer": (
        {"target_modules": ["conv"], "layers_to_transform": [0]},
        "`target_modules` names conv in full, but `layers_to_transform` (=[0]) leaves it out",
    ),
    "a rank for no target": (
        {"target_modules": ["up"], "rank_pattern": {"down": 4}},
        "`rank_pattern`: `down` match no adapted module. There are: `blocks.0.up`",
    ),
    "a rank for a typo": (
        {"target_modules": ["up", "down"], "rank_pattern": {"up": 1, "donw": 4}},
        "`rank_pattern`: `donw` match no adapted module. Nearest: `down`",
    ),
    "an alpha for no target": (
        {"target_modules": ["up"], "alpha_pattern": {r"blocks\.5\.up": 4}},
        r"`alpha_pattern`: `blocks\.5\.up` match no adapted module. Nearest: `blocks.1.up`",
    ),
}


@ways
@pytest.mark.parametrize("case", MEANINGLESS)
def test_targets_that_mean_nothing_are_refused_and_nothing_is_touched(
    case: str, way: Callable[[LoraConfig], tuple[Any, Callable[[], object]]]
) -> None:
    fields, message = MEANINGLESS[case]
    config = LoraConfig(r=2, **fields)
    given = config.to_dict()
    model, attempt = way(config)
    facts, random = nets.known(model), torch.get_rng_state()
    with pytest.raises(TargetError) as caught:
        attempt()
    assert message in str(caught.value)
    nets.assert_as_before(model, facts)
    assert torch.equal(torch.get_rng_state(), random), "random numbers were drawn"
    assert config.to_dict() == given


def test_the_retry_after_a_refusal_is_as_if_it_had_never_been() -> None:
    torch.manual_seed(3)
    model = nets.net()
    with pytest.raises(TargetError):
        get_peft_model(model, LoraConfig(target_modules=["up", "act"]))
    torch.manual_seed(3)
    retried = get_peft_model(model, LoraConfig(target_modules=["up"]))
    first = nets.net()
    torch.manual_seed(3)
    direct = get_peft_model(first, LoraConfig(target_modules=["up"]))
    assert nets.trainable(retried) == nets.trainable(direct)
    ours, theirs = retried.state_dict(), direct.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_refused_target_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="no module is called"):
        get_peft_model(nets.net(), LoraConfig(target_modules=["nowhere"]))


def test_many_modules_are_not_all_listed() -> None:
    model = torch.nn.Module()
    for index in range(40):
        model.add_module(f"part{index:02}", torch.nn.Linear(2, 2))
    with pytest.raises(TargetError, match=r"There are: `part00`, .*`part07` and 32 more\."):
        get_peft_model(model, LoraConfig(target_modules=["xyzzy"]))


def test_a_state_dict_that_names_no_site_of_the_model_is_refused() -> None:
    model = nets.net()
    facts = nets.known(model)
    foreign = {"encoder.q.lora_A.weight": torch.zeros(2, 8)}
    with pytest.raises(TargetError, match="has no tensor of an adapter at a module of this model"):
        inject_adapter_in_model(LoraConfig(r=2), model, state_dict=foreign)
    nets.assert_as_before(model, facts)


@pytest.mark.parametrize("rank", [6, 8, 100])
def test_a_rank_above_the_layers_size_is_allowed_and_merges_alike(rank: int) -> None:
    # A LoRA may be wider than its layer, as in PEFT; it is a waste, and no mistake in the result.
    model = get_peft_model(nets.net(), LoraConfig(r=rank, target_modules=["up", "head"]))
    nets.train_by_hand(model, "default")
    apart = model(nets.ids())
    model.merge_adapter()
    torch.testing.assert_close(model(nets.ids()), apart, rtol=1e-4, atol=1e-4)


def test_targets_that_a_file_names_and_the_model_lacks_are_refused(tmp_path: Any) -> None:
    get_peft_model(nets.net(), LoraConfig(r=2, target_modules=["up"])).save_pretrained(tmp_path)
    other = torch.nn.Sequential(torch.nn.Linear(8, 8))
    facts = nets.known(other)
    with pytest.raises(TargetError, match=r"no module is called `up`\. There are: `0`"):
        PeftModel.from_pretrained(other, tmp_path)
    nets.assert_as_before(other, facts)
