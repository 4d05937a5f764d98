"""Cold adapters wait elsewhere until they are needed: what is moved when, and nothing else changes.

There is one device here. So moves are noted rather than made, except where a test says that it
needs an accelerator.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import multigraft
from multigraft import ConfigError, LoraConfig, PeftModel, StateError, get_peft_model
from multigraft import residency as places
from multigraft.residency import Residency, keep_cold_on_cpu
from tests.laws import fingerprint
from tests.oracle import build, inputs, llama, output, random_state

NAMES = list("abcd")
HOME = torch.device("meta")


def bank(device: str = "cpu") -> PeftModel:
    model = None
    for seed, name in enumerate(NAMES):
        config = LoraConfig(target_modules=["q_proj", "down_proj"], r=2)
        if model is None:
            model = get_peft_model(build(llama).to(device), config, name)
        else:
            model.add_adapter(name, config)
        state = random_state(multigraft.get_peft_model_state_dict(model, adapter_name=name), seed)
        multigraft.set_peft_model_state_dict(model, state, name)
    assert model is not None
    model.set_adapter("a", inference_mode=True)
    return model.eval()


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(adapter, where to), one for each move of a whole adapter."""
    noted: list[tuple[str, str]] = []
    real = Residency._move

    def move(self: Residency, name: str, device: torch.device | None) -> None:
        noted.append((name, "home" if device == HOME else "layers"))
        real(self, name, device)

    monkeypatch.setattr(Residency, "_move", move)
    monkeypatch.setattr(places, "relocate", lambda *_: None)
    return noted


def resident(model: PeftModel) -> list[str]:
    found = model.roster.residency
    assert found is not None
    return list(found.resident)


def test_all_but_the_most_recent_go_home_and_what_acts_stays(moves: list[Any]):
    model = bank()
    keep_cold_on_cpu(model, 2, HOME)
    assert moves == [("b", "home"), ("c", "home")]
    assert sorted(resident(model)) == ["a", "d"]


def test_what_is_activated_is_brought_and_the_least_recently_used_makes_room(moves: list[Any]):
    model = bank()
    keep_cold_on_cpu(model, 2, HOME)
    moves.clear()
    model.set_adapter("b", inference_mode=True)
    assert moves == [("b", "layers"), ("d", "home")]
    model.set_adapter("a", inference_mode=True)
    assert len(moves) == 2  # it was still there
    assert resident(model) == ["b", "a"]


def test_what_a_batch_names_is_brought_even_when_it_is_too_much(moves: list[Any]):
    model = bank()
    keep_cold_on_cpu(model, 1, HOME)
    moves.clear()
    batch = inputs(model)
    y = output(model, batch, adapter_names=[["b", "c"], "d", "__base__"])
    assert {name for name, where in moves if where == "layers"} == {"b", "c", "d"}
    moves.clear()
    output(model, batch, adapter_names=["d"] * 3)
    assert {("b", "home"), ("c", "home")} == set(moves)
    assert resident(model) == ["a", "d"]  # the active one acts again after the call
    with model.mixed_batch([["b", "c"], "d", "__base__"]):
        torch.testing.assert_close(output(model, batch), y)


def test_what_trains_or_is_merged_stays(moves: list[Any]):
    model = bank()
    model.base_model.set_requires_grad("b")
    model.base_model.merge_adapter(["c"])
    keep_cold_on_cpu(model, 1, HOME)
    assert moves == [("d", "home")]
    model.base_model.unmerge_adapter()
    model.base_model.set_requires_grad("b", False)
    model.set_adapter("a", inference_mode=True)
    assert moves[1:] == [("b", "home"), ("c", "home")]


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model.base_model.merge_adapter(["c"]),
        lambda model: model.base_model.set_requires_grad("c"),
        lambda model: model.set_adapter(["a", "c"]),
    ],
    ids=["merging", "training", "activating"],
)
def test_whatever_uses_an_adapter_brings_it_first(moves: list[Any], use: Any):
    model = bank()
    keep_cold_on_cpu(model, 1, HOME)
    moves.clear()
    use(model)
    assert moves[0] == ("c", "layers")


def test_new_adapters_make_room_and_deleted_ones_are_forgotten(moves: list[Any]):
    model = bank()
    keep_cold_on_cpu(model, 2, HOME)
    moves.clear()
    model.add_adapter("e", LoraConfig(target_modules=["q_proj"]))
    assert moves == [("d", "home")]
    model.delete_adapter("e")
    model.set_adapter("b", inference_mode=True)
    assert resident(model) == ["a", "b"] and ("e", "home") not in moves


def test_releasing_brings_all_back(moves: list[Any]):
    model = bank()
    held = keep_cold_on_cpu(model, 1, HOME)
    moves.clear()
    held.release()
    assert moves == [(name, "layers") for name in "bcd"] and model.roster.residency is None
    keep_cold_on_cpu(model, 1, HOME)


def test_where_layers_are_at_home_nothing_is_touched():
    model = bank()
    before = fingerprint(model)
    keep_cold_on_cpu(model, 1)
    assert fingerprint(model) == before


def test_a_moved_parameter_is_the_same_object_with_the_same_values():
    owner = nn.Module()
    owner.weight = weight = nn.Parameter(torch.randn(3))
    owner.register_buffer("scale", torch.ones(1))
    values = weight.detach().clone()
    for leaf in ("weight", "scale"):
        places.relocate(owner, leaf, torch.device("cpu", 0))  # another name of the same device
    assert owner.weight is weight and torch.equal(weight, values)
    assert owner.scale.device == torch.device("cpu")


def test_a_copy_of_the_model_has_its_own(moves: list[Any]):
    model = bank()
    keep_cold_on_cpu(model, 1, HOME)
    twin = copy.deepcopy(model)
    twin.set_adapter("d", inference_mode=True)
    assert resident(model) == ["a"] and resident(twin) == ["d"]


@pytest.mark.parametrize("most", [0, -1, True, 1.5, None])
def test_a_number_below_one_is_refused(most: Any):
    with pytest.raises(ConfigError, match="at least 1"):
        keep_cold_on_cpu(bank(), most)


def test_doing_it_twice_or_to_a_model_without_adapters_is_refused():
    model = bank()
    keep_cold_on_cpu(model, 1)
    with pytest.raises(StateError, match=r"\.release\(\)"):
        keep_cold_on_cpu(model, 2)
    with pytest.raises(StateError, match="has no adapters"):
        keep_cold_on_cpu(nn.Linear(2, 2), 1)


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu_outputs_stay_and_cold_adapters_are_on_the_cpu():
    model = bank("cuda")
    batch = {name: tensor.cuda() for name, tensor in inputs(model).items()}
    names = ["b", ["c", "d"], "__base__"]
    expected = output(model, batch), output(model, batch, adapter_names=names)
    keep_cold_on_cpu(model, 1)
    where = {p.device.type for n, p in model.named_parameters() if ".d." in n}
    assert where == {"cpu"} and all(
        p.is_pinned() for n, p in model.named_parameters() if ".d." in n
    )
    assert torch.equal(output(model, batch), expected[0])
    assert torch.equal(output(model, batch, adapter_names=names), expected[1])
    model.set_adapter("d")
    assert {p.device.type for n, p in model.named_parameters() if ".d." in n} == {"cuda"}
