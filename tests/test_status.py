"""What is true of layers and models now; that PEFT says the same is in `test_behaviour_parity`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from multigraft import (
    get_layer_status,
    get_model_status,
    get_peft_model,
    inject_adapter_in_model,
)
from multigraft.merge import unmerge_layer
from tests.subject import LINEAR, Subject, layers


@pytest.fixture
def model() -> Any:
    """`a` on all linear layers, `b` on the head alone."""
    subject = Subject()
    model = get_peft_model(subject.base, subject.config(), "a")
    model.add_adapter("b", subject.config(["head"]))
    return model


def test_a_layer_tells_of_the_adapters_that_it_has(model: Any) -> None:
    status = {s.name: s for s in get_layer_status(model)}
    assert sorted(status) == LINEAR
    assert status["head"].available_adapters == ["a", "b"]
    assert status["layers.0.up"].available_adapters == ["a"]
    assert status["head"].requires_grad == {"a": True, "b": False}
    assert status["head"].devices == {"a": ["cpu"], "b": ["cpu"]}


def test_an_adapter_that_is_frozen_at_one_layer_is_irregular(model: Any) -> None:
    layers(model.get_base_model())[0].lora_A["a"].weight.requires_grad_(False)
    assert get_model_status(model).requires_grad == {"a": "irregular", "b": False}
    assert get_layer_status(model)[0].requires_grad == {"a": "irregular"}


def test_an_adapter_that_is_merged_at_one_layer_is_irregular(model: Any) -> None:
    model.base_model.merge_adapter(["a"])
    assert get_model_status(model).merged_adapters == ["a"]
    unmerge_layer(layers(model.get_base_model())[0])
    assert get_model_status(model).merged_adapters == "irregular"


def test_an_adapter_of_one_layer_is_merged_when_it_is_merged_there(model: Any) -> None:
    model.base_model.merge_adapter(["b"])
    assert get_model_status(model).merged_adapters == ["b"]


def test_counts_are_of_the_whole_model(model: Any) -> None:
    status = get_model_status(model)
    assert status.total_params == sum(p.numel() for p in model.parameters())
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (status.num_adapter_layers, status.base_model_type) == (5, "Net")
    assert status.peft_types == {"a": "LORA", "b": "LORA"}


def test_a_model_adapted_in_place_is_asked_directly() -> None:
    subject = Subject()
    inject_adapter_in_model(subject.config(), subject.base, "mine")
    assert get_model_status(subject.base).available_adapters == ["mine"]
    assert [s.name for s in get_layer_status(subject.base)] == [
        s.path for s in layers(subject.base)
    ]


def test_the_handle_and_its_tuner_tell_the_same(model: Any) -> None:
    assert get_layer_status(model) == get_layer_status(model.base_model)
    assert model.get_layer_status() == get_layer_status(model)
    assert model.get_model_status() == get_model_status(model)


def test_a_model_without_adapters_has_none() -> None:
    status = get_model_status(nn.Linear(2, 2))
    assert (status.num_adapter_layers, status.active_adapters, status.peft_types) == (0, [], {})
    assert status.enabled is True
    assert get_layer_status(nn.Linear(2, 2)) == []


def test_disabling_is_said_of_every_layer(model: Any) -> None:
    with model.disable_adapter():
        assert not any(s.enabled for s in get_layer_status(model))
        assert get_model_status(model).enabled is False
    assert get_model_status(model).enabled is True


def test_a_moved_model_says_where_its_adapters_are(model: Any) -> None:
    model.to(torch.device("meta"))
    assert get_model_status(model).devices == {"a": ["meta"], "b": ["meta"]}
