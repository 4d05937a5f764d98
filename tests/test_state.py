"""Reading and writing one adapter's tensors on a live model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from multigraft import (
    AdapterNameError,
    CheckpointError,
    PeftModel,
    StateError,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from tests.subject import Subject

PREFIX = "base_model.model."


@pytest.fixture
def model() -> PeftModel:
    """`default` on the head and the embedding, `b` on everything linear."""
    subject = Subject()
    model = get_peft_model(subject.base, subject.config(["head", "emb"]))
    model.add_adapter("b", subject.config())
    return model


def noise(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.randn_like(value) for key, value in state.items()}


def test_what_is_written_is_what_is_read(model: PeftModel) -> None:
    fresh = noise(get_peft_model_state_dict(model))
    set_peft_model_state_dict(model, fresh)
    state = get_peft_model_state_dict(model)
    assert state.keys() == fresh.keys()
    assert all(torch.equal(state[key], fresh[key]) for key in state)


def test_writing_one_adapter_leaves_the_others_values(model: PeftModel) -> None:
    before = {k: v.clone() for k, v in get_peft_model_state_dict(model, adapter_name="b").items()}
    set_peft_model_state_dict(model, noise(get_peft_model_state_dict(model)))
    after = get_peft_model_state_dict(model, adapter_name="b")
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_parameters_stay_the_objects_that_an_optimizer_holds(model: PeftModel) -> None:
    before = get_peft_model_state_dict(model)
    set_peft_model_state_dict(model, noise(before))
    after = get_peft_model_state_dict(model)
    assert all(after[key] is before[key] for key in before)


def test_given_tensors_are_taken_over_when_memory_is_short(model: PeftModel) -> None:
    fresh = noise(get_peft_model_state_dict(model))
    set_peft_model_state_dict(model, fresh, low_cpu_mem_usage=True)
    state = get_peft_model_state_dict(model)
    assert all(state[key].data_ptr() == fresh[key].data_ptr() for key in fresh)
    assert all(isinstance(value, nn.Parameter) and value.requires_grad for value in state.values())


def test_an_adapter_made_on_the_meta_device_gets_its_values_and_its_dtype() -> None:
    subject = Subject()
    model = get_peft_model(subject.base, subject.config(["head"]), low_cpu_mem_usage=True)
    given = {k: torch.ones(v.shape) for k, v in get_peft_model_state_dict(model).items()}
    set_peft_model_state_dict(model, given)
    state = get_peft_model_state_dict(model)
    assert {value.dtype for value in state.values()} == {torch.float64}
    assert all(bool((value == 1).all()) for value in state.values())


def test_keys_of_a_model_adapted_in_place_have_no_prefix_and_both_are_read() -> None:
    subject = Subject()
    inject_adapter_in_model(subject.config(["head"]), subject.base)
    state = get_peft_model_state_dict(subject.base)
    assert sorted(state) == ["head.lora_A.weight", "head.lora_B.weight"]
    fresh = noise(state)
    set_peft_model_state_dict(subject.base, {PREFIX + k: v for k, v in fresh.items()})
    assert all(torch.equal(state[key], fresh[key]) for key in state)


def test_a_write_that_fails_half_way_puts_everything_back(
    model: PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    real, calls = Tensor.copy_, []

    def fail(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(self)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return real(self, *args, **kwargs)

    fresh = noise(before)
    monkeypatch.setattr(Tensor, "copy_", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        set_peft_model_state_dict(model, fresh)
    after = get_peft_model_state_dict(model)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_copies_of_the_base_in_a_file_are_passed_by_where_they_are_equal(model: PeftModel) -> None:
    state = get_peft_model_state_dict(model, save_embedding_layers=True)
    key = f"{PREFIX}emb.base_layer.weight"
    assert key in state
    assert set_peft_model_state_dict(model, state).unexpected_keys == []
    other = state | {key: state[key] + 1}
    with pytest.raises(CheckpointError, match=r"not part of this adapter.*emb\.base_layer\.weight"):
        set_peft_model_state_dict(model, other)


def test_a_copy_of_the_base_is_the_bases_own_while_adapters_are_merged(model: PeftModel) -> None:
    own = model.get_base_model().emb.base_layer.weight.detach().clone()
    model.merge_adapter(["default"])
    state = get_peft_model_state_dict(model, save_embedding_layers=True)
    assert torch.equal(state[f"{PREFIX}emb.base_layer.weight"], own)


def test_a_gathered_state_dict_gives_the_values(model: PeftModel) -> None:
    gathered = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    state = get_peft_model_state_dict(model, state_dict=gathered)
    assert all(bool((value == 0).all()) for value in state.values())


def test_an_absent_adapter_and_a_model_without_any_are_refused(model: PeftModel) -> None:
    for call in (get_peft_model_state_dict, lambda m, **k: set_peft_model_state_dict(m, {}, **k)):
        with pytest.raises(AdapterNameError, match="no adapter is called `c`"):
            call(model, adapter_name="c")
        with pytest.raises(StateError, match="Linear has no adapters"):
            call(nn.Linear(2, 2))
