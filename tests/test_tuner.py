"""The lifecycle on a model in place. Its weak spots of old are in `weaknesses`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from multigraft import (
    AdapterNameError,
    MultigraftWarning,
    PeftModel,
    StateError,
    get_peft_model,
    inject_adapter_in_model,
)
from multigraft.tuner import Tuner, base_of
from tests.subject import Subject, layers


@pytest.fixture
def subject() -> Subject:
    return Subject()


@pytest.fixture
def tuner(subject: Subject) -> Tuner:
    """`a` on all linear layers, `b` on the head, `c` on the embedding; `a` is active."""
    tuner = Tuner(subject.base)
    tuner.add_adapter("a", subject.config())
    tuner.add_adapter("b", subject.config(["head"]))
    tuner.add_adapter("c", subject.config(["emb"]))
    return tuner


def base_output(subject: Subject) -> Tensor:
    """What the base gives; frozen, as an adapted one is: torch's rounding depends on that."""
    return subject.pristine.requires_grad_(False)(subject.ids)


def trained(tuner: Tuner) -> list[str]:
    return [name for name in tuner.peft_config if tuner.roster.trains(name)]


def test_the_first_adapter_is_active_and_trains_and_later_ones_wait(tuner: Tuner) -> None:
    assert tuner.active_adapters == tuner.active_adapter == ["a"]
    assert trained(tuner) == ["a"]


def test_a_config_for_inference_starts_frozen(subject: Subject) -> None:
    tuner = Tuner(subject.base)
    tuner.add_adapter("a", subject.config(inference_mode=True))
    assert tuner.active_adapters == ["a"]
    assert trained(tuner) == []


def test_setting_adapters_makes_exactly_these_active_and_trainable(tuner: Tuner) -> None:
    tuner.set_adapter(["c", "b"])
    assert tuner.active_adapters == ["c", "b"]
    assert trained(tuner) == ["b", "c"]
    tuner.set_adapter("a", inference_mode=True)
    assert (tuner.active_adapters, trained(tuner)) == (["a"], [])


def test_setting_no_adapter_gives_the_base(subject: Subject, tuner: Tuner) -> None:
    tuner.set_adapter([])
    assert torch.equal(tuner(subject.ids), base_output(subject))


def test_adding_can_make_active_at_once_and_then_freezes_no_other(subject: Subject) -> None:
    tuner = Tuner(subject.base)
    tuner.add_adapter("a", subject.config())
    tuner.add_adapter("b", subject.config(), activate=True)
    assert tuner.active_adapters == ["b"]
    assert trained(tuner) == ["a", "b"]


def test_setting_an_adapter_unmerges_the_others_and_says_so(tuner: Tuner) -> None:
    tuner.merge_adapter(["a", "c"])
    with pytest.warns(MultigraftWarning, match=r"\['a'\] were merged and are not among"):
        tuner.set_adapter("c")
    assert tuner.roster.merged == ["c"]


def test_a_block_of_disabled_adapters_ends_as_it_began(subject: Subject, tuner: Tuner) -> None:
    expected = tuner(subject.ids)
    with pytest.raises(RuntimeError, match="boom"), tuner.disabled():
        assert torch.equal(tuner(subject.ids), base_output(subject))
        raise RuntimeError("boom")
    assert torch.equal(tuner(subject.ids), expected)


def test_one_name_may_stand_for_a_list_of_one(subject: Subject, tuner: Tuner) -> None:
    tuner.merge_adapter("b")  # type: ignore[arg-type]
    assert tuner.roster.merged == ["b"]
    tuner.unmerge_adapter("b")  # type: ignore[arg-type]
    assert tuner.roster.merged == []


def test_the_base_shows_its_configs_while_there_are_adapters(
    subject: Subject, tuner: Tuner
) -> None:
    assert subject.base.peft_config is tuner.peft_config
    for name in ("b", "c"):
        tuner.delete_adapter(name)
    assert list(subject.base.peft_config) == ["a"]
    tuner.delete_adapter("a")
    assert not hasattr(subject.base, "peft_config")


def test_unloading_gives_back_the_same_object_and_bits_also_while_merged(
    subject: Subject, tuner: Tuner
) -> None:
    tuner.merge_adapter(["a", "c"])
    assert tuner.unload() is subject.base
    subject.assert_restored()


def test_unknown_attributes_are_the_base_models_and_else_an_error(
    subject: Subject, tuner: Tuner
) -> None:
    assert tuner.conv is subject.base.conv
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = tuner.nothing_like_it


def test_every_adapted_layer_is_listed_once(subject: Subject, tuner: Tuner) -> None:
    assert {id(x) for x in tuner.layers()} == {id(x) for x in layers(subject.base)}
    assert len(tuner.layers()) == 6


def test_only_the_layers_of_the_first_adapter_lose_their_gradients_with_it(
    subject: Subject,
) -> None:
    wanted = {n for n, p in subject.base.named_parameters() if p.requires_grad}
    tuner = Tuner(subject.base)
    tuner.add_adapter("a", subject.config())
    assert not any(p.requires_grad for n, p in subject.base.named_parameters() if "lora_" not in n)
    tuner.delete_adapter("a")
    assert {n for n, p in subject.base.named_parameters() if p.requires_grad} == wanted


def test_a_handle_of_a_handle_has_the_same_base(subject: Subject) -> None:
    model = get_peft_model(subject.base, subject.config())
    for handle in (model, model.base_model, PeftModel(model, None), subject.base):
        assert base_of(handle) is subject.base


def test_a_base_models_own_child_called_base_model_is_no_handle() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_model = nn.Linear(2, 2)

    outer = Outer()
    assert base_of(outer) is outer


def test_injecting_gives_the_model_back_active_and_in_the_bases_dtype() -> None:
    subject = Subject()
    subject.base.bfloat16()
    found: Any = inject_adapter_in_model(subject.config(["head"]), subject.base, "mine")
    assert found is subject.base
    assert found.head.lora_A["mine"].weight.dtype == torch.bfloat16
    assert found.head.roster.active == ("mine",)


def test_injecting_by_a_state_dict_adapts_its_sites_and_leaves_their_values(
    subject: Subject,
) -> None:
    state = {"head.lora_A.weight": torch.full((2, 16), 7.0), "conv.lora_B.weight": torch.ones(1)}
    inject_adapter_in_model(subject.config(["up"]), subject.base, state_dict=state)
    assert sorted(x.path for x in layers(subject.base)) == ["conv", "head"]
    assert not bool((subject.base.head.lora_A["default"].weight == 7).any())


def test_what_cannot_be_done_changes_no_flag(tuner: Tuner) -> None:
    before = tuner.active_adapters, trained(tuner)
    for call in (
        lambda: tuner.set_adapter(["b", "x"]),
        lambda: tuner.set_requires_grad(["b", "x"]),
        lambda: tuner.delete_adapter("x"),
        lambda: tuner.merge_adapter(["b", "x"]),
    ):
        with pytest.raises(AdapterNameError, match="no adapter is called `x`"):
            call()
    with tuner.disabled(), pytest.raises(StateError, match="disabled"):
        tuner.merge_adapter()
    assert (tuner.active_adapters, trained(tuner)) == before
