"""Which sites a config means. What is refused, and how, is in `bad_input/test_targets.py`."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from multigraft import LoraConfig, MultigraftWarning, TargetError
from multigraft.sites import find, minimal_names
from multigraft.survey import survey
from tests.oracle import Stack
from tests.subject import LINEAR, Net


def needs(model: nn.Module, *, lenient: bool = False, **options: Any) -> list[tuple[str, str]]:
    """(path, method), in the order in which they are found."""
    found = find(model, LoraConfig(**options), survey(model), lenient=lenient)
    return [(str(need.site), need.method.name) for need in found]


def targets(model: nn.Module, **options: Any) -> list[str]:
    return [path for path, method in needs(model, **options) if method == "LORA"]


def test_a_list_names_ends_of_paths_and_finds_them_in_the_models_order() -> None:
    expected = ["layers.0.up", "layers.1.up", "head"]
    assert targets(Net(), target_modules=["head", "up"]) == expected


def test_a_name_may_be_several_components_and_only_whole_ones() -> None:
    assert targets(Net(), target_modules=["1.up"]) == ["layers.1.up"]
    assert targets(Stack(), target_modules=["q_proj"]) == [f"layers.{i}.q_proj" for i in range(3)]
    with pytest.raises(TargetError, match="no module is called `proj`"):
        targets(Stack(), target_modules=["proj"])


def test_a_string_is_an_expression_for_the_whole_path() -> None:
    assert targets(Net(), target_modules=r"layers\.0\..*(up|down)") == [
        "layers.0.up",
        "layers.0.down",
    ]
    with pytest.raises(TargetError, match="matches no module's whole path"):
        targets(Net(), target_modules=r"up")


def test_all_linear_is_every_linear_layer_but_the_output_head() -> None:
    model = Net()
    assert sorted(targets(model, target_modules="all-linear")) == LINEAR
    model.get_output_embeddings = lambda: model.head
    assert sorted(targets(model, target_modules="all-linear")) == [n for n in LINEAR if n != "head"]


def test_a_sequence_classifiers_head_is_no_target_of_all_linear() -> None:
    model = Net()
    model.score = nn.Linear(2, 2)
    options = {"target_modules": "all-linear", "task_type": "SEQ_CLS"}
    assert sorted(targets(model, **options)) == LINEAR
    assert sorted(targets(model, target_modules="all-linear")) == [*LINEAR, "score"]


@pytest.mark.parametrize("excluded", [["0.up"], ["layers.0.up"], r"layers\.0\.up"])
def test_exclusion_wins_over_targets(excluded: list[str] | str) -> None:
    options = {"target_modules": ["up"], "exclude_modules": excluded}
    assert targets(Net(), **options) == ["layers.1.up"]


@pytest.mark.parametrize("indices", [1, [1]])
@pytest.mark.parametrize("wanted", [["up", "down"], "all-linear"])
def test_layer_indices_let_these_layers_in(indices: Any, wanted: Any) -> None:
    found = targets(Net(), target_modules=wanted, layers_to_transform=indices)
    assert found == ["layers.1.up", "layers.1.down"]


def test_the_first_number_of_a_path_is_the_layers_index_unless_a_pattern_says_which() -> None:
    model = nn.ModuleDict({"h": nn.ModuleList(nn.ModuleDict({"e": experts()}) for _ in range(2))})
    options: dict[str, Any] = {"target_modules": ["w"], "layers_to_transform": [1]}
    assert targets(model, **options) == [f"h.1.e.{j}.w" for j in range(3)]
    assert targets(model, **options, layers_pattern="e") == [f"h.{i}.e.1.w" for i in range(2)]
    assert targets(model, **options, layers_pattern=["none", "h"]) == targets(model, **options)


def experts() -> nn.Module:
    return nn.ModuleList(nn.ModuleDict({"w": nn.Linear(2, 2)}) for _ in range(3))


def test_saved_modules_are_no_targets_and_containers_are_saved_by_their_parts() -> None:
    found = needs(Net(), target_modules=["up", "down"], modules_to_save=["0"])
    assert found == [
        ("layers.1.up", "LORA"),
        ("layers.1.down", "LORA"),
        ("layers.0.up", "SAVED_MODULE"),
        ("layers.0.norm", "SAVED_MODULE"),
        ("layers.0.down", "SAVED_MODULE"),
    ]


def test_a_container_with_a_parameter_of_its_own_is_saved_whole() -> None:
    model = Net()
    model.layers[0].gain = nn.Parameter(torch.ones(1))
    found = needs(model, target_modules=["head"], modules_to_save=["0"])
    assert [path for path, method in found if method == "SAVED_MODULE"] == ["layers.0"]


def test_biases_of_the_targets_or_of_all_layers_are_trained_but_not_saved_ones() -> None:
    options: dict[str, Any] = {"target_modules": ["up", "down"], "modules_to_save": ["head"]}

    def biases(kind: str) -> list[str]:
        found = needs(Net(), **options, bias=kind)
        return [path for path, method in found if method == "BIAS"]

    assert biases("none") == []
    assert biases("lora_only") == ["layers.0.up.bias", "layers.1.up.bias"]
    norms = ["layers.0.norm.bias", "layers.1.norm.bias"]
    assert sorted(biases("all")) == sorted([*biases("lora_only"), *norms, "conv.bias"])


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_no_target_is_refused_or_in_files_warned_of(field: str) -> None:
    options: dict[str, Any] = {"target_modules": ["up"], field: {"down": 3, "up": 2}}
    expected = rf"`{field}`: `down` match no adapted module"
    with pytest.raises(TargetError, match=expected):
        needs(Net(), **options)
    with pytest.warns(MultigraftWarning, match=expected):
        needs(Net(), lenient=True, **options)


def test_a_name_that_means_nothing_beside_one_that_does_is_a_warning_in_files() -> None:
    options: dict[str, Any] = {"target_modules": ["up", "dwon"]}
    with pytest.warns(MultigraftWarning, match=r"`dwon`\. Nearest: `down`"):
        found = needs(Net(), lenient=True, **options)
    assert [path for path, _ in found] == ["layers.0.up", "layers.1.up"]


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (["layers.0.q_proj", "layers.1.q_proj", "layers.2.q_proj"], ["q_proj"]),
        (["layers.0.q_proj", "head"], ["head", "layers.0.q_proj"]),
    ],
)
def test_the_shortest_names_mean_exactly_the_chosen(chosen: list[str], expected: Any) -> None:
    model = Stack()
    spots = survey(model)
    found = minimal_names([s for s in spots if s.path in chosen], spots)
    assert found == expected
    assert targets(model, target_modules=found) == sorted(chosen, key=[s.path for s in spots].index)


def test_where_one_path_ends_like_another_only_an_expression_is_exact() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.ModuleDict({"a": nn.Linear(2, 2)})})
    spots = survey(model)
    found = minimal_names([s for s in spots if s.path == "a"], spots)
    assert isinstance(found, str)
    assert [p for p in ("a", "b.a") if re.fullmatch(found, p)] == ["a"]


def test_finding_draws_no_random_number_and_changes_no_module() -> None:
    model = Net()
    modules, state = list(model.named_modules()), torch.get_rng_state()
    needs(model, target_modules="all-linear", bias="all", modules_to_save=["conv"])
    assert list(model.named_modules()) == modules
    assert torch.equal(torch.get_rng_state(), state)
