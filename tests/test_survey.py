"""The base view: what a model looks like when every wrapper is seen through."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations

from multigraft import NestingError, get_peft_model
from multigraft.survey import adapted_layers, survey
from tests.subject import LINEAR, Net, Subject


def paths(model: nn.Module) -> list[str]:
    return [spot.path for spot in survey(model)]


def test_modules_come_in_their_own_order_without_the_root() -> None:
    model = Net()
    assert paths(model) == [name for name, _ in model.named_modules() if name]


def test_an_adapted_model_looks_as_it_did_before() -> None:
    subject = Subject()
    before = [(s.path, s.layer) for s in survey(subject.base)]
    get_peft_model(subject.base, subject.config(modules_to_save=["conv"]))
    after = survey(subject.base)
    assert [(s.path, s.layer) for s in after] == before
    assert sorted(s.path for s in after if s.wrapper) == sorted([*LINEAR, "conv"])


def test_a_shared_module_is_one_spot_with_all_its_paths_and_places() -> None:
    model = nn.Module()
    model.one = model.other = nn.Linear(2, 2)
    (spot,) = survey(model)
    assert spot.paths == ["one", "other"]
    assert spot.path == "one"
    assert spot.places == [(model, "one"), (model, "other")]


def test_a_module_inside_a_shared_one_is_found_under_both() -> None:
    block, model = nn.Sequential(nn.Linear(2, 2)), nn.Module()
    model.one = model.other = block
    assert {s.path: s.paths for s in survey(model)} == {
        "one": ["one", "other"],
        "one.0": ["one.0", "other.0"],
    }


def test_names_that_hold_nothing_are_passed_by() -> None:
    model = nn.Module()
    model.register_module("gone", None)
    model.there = nn.Linear(2, 2)
    assert paths(model) == ["there"]


@pytest.mark.parametrize(
    "wrap",
    [torch.compile, nn.DataParallel, checkpoint_wrapper],
    ids=["compiled", "data parallel", "checkpointed"],
)
@pytest.mark.parametrize("at", ["root", "block", "layer"])
def test_wrappers_of_torch_are_no_part_of_a_path(wrap: object, at: str) -> None:
    model: nn.Module = Net()
    plain = [(s.path, s.layer) for s in survey(model)]
    if at == "root":
        model = wrap(model)  # type: ignore[operator]
    elif at == "block":
        model.layers[0] = wrap(model.layers[0])  # type: ignore[operator]
    else:
        model.layers[0].up = wrap(model.layers[0].up)  # type: ignore[operator]
    assert [(s.path, s.layer) for s in survey(model)] == plain


def test_a_layer_in_a_wrapper_of_torch_hangs_in_it() -> None:
    model = nn.Module()
    model.up = checkpoint_wrapper(nn.Linear(2, 2))
    (spot,) = survey(model)
    assert spot.places == [(model.up, "_checkpoint_wrapped_module")]


def test_a_users_module_called_like_a_wrappers_child_is_a_module() -> None:
    model = nn.Module()
    model.module = nn.Sequential(nn.Linear(2, 2))
    assert paths(model) == ["module", "module.0"]


def test_how_a_weight_is_parametrised_is_no_layer() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 2)))
    assert paths(model) == ["0"]


def test_adapted_layers_come_each_once() -> None:
    model = nn.Module()
    model.one = model.other = nn.Linear(2, 2)
    subject = Subject()
    get_peft_model(model, subject.config(["one"]))
    assert adapted_layers(model) == [model.one]


def test_an_adapted_layer_is_no_model() -> None:
    subject = Subject()
    get_peft_model(subject.base, subject.config())
    with pytest.raises(NestingError, match=r"adapted layer at layers\.0\.up"):
        survey(subject.base.layers[0].up)


def test_looking_changes_nothing() -> None:
    subject = Subject()
    survey(subject.base)
    subject.assert_restored()
