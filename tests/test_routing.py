"""Routes: which rows of a layer's input go to which adapter."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor

from multigraft import RoutingError, get_peft_model
from multigraft.routing import BASE, Route, check_names
from tests.subject import Subject

LAYER: Any = types.SimpleNamespace(path="layers.0.up")


def rows(route: Route, x: Tensor) -> dict[str, list[int]]:
    return {"+".join(names): indices.tolist() for names, indices in route.groups(x, LAYER)}


def test_each_adapter_gets_its_rows_and_the_base_gets_none() -> None:
    route = Route(["b", BASE, "a", "b"])
    assert rows(route, torch.zeros(4, 7, 2)) == {"b": [0, 3], "a": [2]}


def test_rows_may_name_several_adapters_each_counted_once() -> None:
    route = Route([["b", "a"], "a", BASE, ("b", "a", "b"), ["a"]])
    assert rows(route, torch.zeros(5, 7, 2)) == {"b+a": [0, 3], "a": [1, 4]}
    assert route.adapters == ("b", "a")


def test_a_batch_of_the_base_alone_has_no_groups_whatever_the_input() -> None:
    assert Route([BASE, BASE]).groups(torch.zeros(5, 2), LAYER) == []


def test_rows_of_a_flattened_input_go_with_their_row_of_the_batch() -> None:
    route = Route(["a", "b"], tokens=3)
    assert rows(route, torch.zeros(6, 2)) == {"a": [0, 1, 2], "b": [3, 4, 5]}


def test_repeated_rows_go_with_their_row_and_unrepeated_ones_do_too() -> None:
    route = Route(["a", "b"], repeats=2)
    assert rows(route, torch.zeros(4, 7, 2)) == {"a": [0, 1], "b": [2, 3]}
    assert rows(route, torch.zeros(2, 7, 2)) == {"a": [0], "b": [1]}


def test_repeated_rows_may_be_flattened_as_well() -> None:
    route = Route(["a", "b"], repeats=2, tokens=3)
    found = rows(route, torch.zeros(12, 2))
    assert found == {"a": list(range(6)), "b": list(range(6, 12))}


@pytest.mark.parametrize("size", [3, 5, 7, 8, 24])
def test_an_input_of_another_size_is_refused_by_layer_and_size(size: int) -> None:
    route = Route(["a", "b"], repeats=3, tokens=5)
    expected = rf"layers\.0\.up: .*first axis \(={size}\).*\(=2 rows\)"
    with pytest.raises(RoutingError, match=expected):
        route.groups(torch.zeros(size, 4), LAYER)


def test_an_input_that_all_rows_share_is_given_to_each() -> None:
    shared = torch.arange(3.0).reshape(1, 3)
    assert Route(["a", "b"], repeats=2).spread(shared).tolist() == [[0, 1, 2]] * 4
    several = torch.zeros(2, 3)
    assert Route(["a", "b"]).spread(several) is several


def test_one_row_needs_no_spreading_however_often_it_is_repeated() -> None:
    route = Route(["a"], repeats=3)
    shared = torch.zeros(1, 3)
    assert route.spread(shared) is shared
    assert rows(route, shared) == {"a": [0]}


def test_indices_are_made_once_for_all_layers() -> None:
    route = Route(["a", "b"], tokens=3)
    first = route.groups(torch.zeros(2, 4), LAYER)
    assert route.groups(torch.zeros(2, 9, 9), LAYER) is first
    assert route.groups(torch.zeros(6, 4), LAYER) is not first


@pytest.fixture
def model() -> Any:
    subject = Subject()
    model = get_peft_model(subject.base, subject.config(), "a")
    model.add_adapter("b", subject.config())
    return model


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("a", r"\(='a'\) must be a list"),
        ([1, "a"], "must be a list"),
        (["a"], "1 names for a batch of 2 rows"),
        (["a", "bb"], r"no adapter is called `bb`\. Nearest: `b`\. There are: `a`, `b`"),
    ],
)
def test_names_that_do_not_fit_the_batch_are_refused(model: Any, names: Any, expected: str) -> None:
    with pytest.raises(RoutingError, match=expected):
        check_names(names, 2, model.roster)


def test_merged_and_disabled_adapters_cannot_be_routed_to(model: Any) -> None:
    with model.disable_adapter(), pytest.raises(RoutingError, match="disabled"):
        check_names(["a", "b"], 2, model.roster)
    model.base_model.merge_adapter(["b"])
    with pytest.raises(RoutingError, match=r"\['b'\] are merged"):
        check_names(["a", BASE], 2, model.roster)


def test_names_are_checked_against_every_adapter_once(model: Any) -> None:
    asked: list[str] = []
    model.roster.check_batchable = asked.append
    check_names(["b", BASE, "a", "b"], 4, model.roster)
    assert asked == ["a", "b"]
