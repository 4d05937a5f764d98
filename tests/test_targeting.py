"""The rule of targets, module by module: one verdict each, and what decided it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from multigraft import LoraConfig, TargetError
from multigraft.sites import find, verdicts
from multigraft.survey import survey
from multigraft.targeting import Outcome, matching


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(6, 4)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 6)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


@pytest.fixture
def net() -> Net:
    return Net()


def decided(net: Net, **fields: object) -> dict[str, tuple[Outcome, str]]:
    spots = survey(net)
    found = verdicts(net, LoraConfig(**fields), spots)
    return {spot.path: tuple(verdict) for spot, verdict in zip(spots, found, strict=True)}


def test_a_name_chooses_and_is_named(net):
    found = decided(net, target_modules=["1.up", "up"])
    assert found["layers.0.up"] == (Outcome.CHOSEN, "up")
    assert found["layers.1.up"] == (Outcome.CHOSEN, "1.up")
    assert found["layers.0.down"] == (Outcome.UNNAMED, "")


def test_exceptions_come_after_names(net):
    found = decided(net, target_modules=["up"], exclude_modules=["0.up", "head"])
    assert found["layers.0.up"] == (Outcome.EXCLUDED, "0.up")
    assert found["head"] == (Outcome.UNNAMED, "")


def test_layers_that_are_not_asked_for_are_left_out(net):
    found = decided(net, target_modules=["up"], layers_to_transform=1)
    assert [found[f"layers.{n}.up"][0] for n in (0, 1)] == [Outcome.OTHER_LAYER, Outcome.CHOSEN]


def test_a_full_path_in_another_layer_is_a_contradiction(net):
    found = decided(net, target_modules=["layers.0.up", "down"], layers_to_transform=1)
    assert found["layers.0.up"] == (Outcome.CLASH, "layers.0.up")


def test_all_linear_tells_heads_from_what_is_not_linear(net):
    found = decided(net, target_modules="all-linear", modules_to_save=["0.down"])
    assert found["head"][0] is Outcome.HEAD
    assert found["words"][0] is found["layers"][0] is Outcome.NOT_LINEAR
    assert found["layers.0.down"] == (Outcome.SAVED, "all-linear")
    assert found["layers.0.up"] == (Outcome.CHOSEN, "all-linear")


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["up", "head"]},
        {"target_modules": r"layers\.\d\.down"},
        {"target_modules": "all-linear", "exclude_modules": ["0.up"], "layers_to_transform": [0]},
        {"target_modules": ["up", "down"], "modules_to_save": ["1.down"]},
    ],
    ids=str,
)
def test_attaching_takes_what_is_chosen_and_nothing_else(net, fields):
    chosen = [
        path for path, (outcome, _) in decided(net, **fields).items() if outcome is Outcome.CHOSEN
    ]
    needs = find(net, LoraConfig(**fields), survey(net))
    assert [need.site.path for need in needs if need.method.name == "LORA"] == chosen
    assert chosen


def test_a_module_in_two_places_is_chosen_by_either_name():
    shared = nn.Linear(4, 4)
    net = nn.ModuleDict({"first": shared, "second": shared, "other": nn.Linear(4, 4)})
    spots = survey(net)
    found = verdicts(net, LoraConfig(target_modules=["second"]), spots)
    assert [verdict.outcome for verdict in found] == [Outcome.CHOSEN, Outcome.UNNAMED]


def test_names_match_whole_components_and_expressions_whole_paths():
    assert matching(["proj"], "a.proj") == "proj"
    assert matching(["proj"], "a.my_proj") is None
    assert matching(r".*proj", "a.my_proj") == r".*proj"
    assert matching("proj", "a.proj") is None


def test_nothing_is_decided_where_another_field_means_nothing(net):
    with pytest.raises(TargetError, match="modules_to_save"):
        decided(net, target_modules=["up"], modules_to_save=["nowhere"])


def test_deciding_leaves_the_model_alone(net):
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    decided(net, target_modules="all-linear")
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())
