"""What ``target_modules=None`` means, and the heads that tasks train."""

from __future__ import annotations

import types
from typing import Any

import pytest
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFTS
from torch import nn

from multigraft.defaults import LORA_TARGETS, TASK_HEADS, default_targets, task_heads
from multigraft.errors import TargetError


def model(config: Any) -> nn.Module:
    made = nn.Module()
    made.config = config
    return made


def of_type(kind: str) -> nn.Module:
    return model(types.SimpleNamespace(model_type=kind))


def test_every_architecture_of_the_installed_peft_means_the_same() -> None:
    assert {kind: LORA_TARGETS.get(kind) for kind in PEFTS} == PEFTS


@pytest.mark.parametrize("kind", [dict, types.SimpleNamespace])
def test_the_config_may_be_an_object_or_a_dictionary(kind: Any) -> None:
    assert default_targets(model(kind(model_type="gpt2"))) == ["c_attn"]


@pytest.mark.parametrize("config", [None, {}, types.SimpleNamespace()])
def test_a_model_without_a_type_is_asked_for_names(config: Any) -> None:
    with pytest.raises(TargetError, match=r"`target_modules` \(=None\).*Name the modules"):
        default_targets(model(config))


def test_an_unknown_type_is_refused_with_the_nearest_known() -> None:
    with pytest.raises(TargetError, match=r"`model_type` \(='llama5'\).*Nearest: .*`llama4`"):
        default_targets(of_type("llama5"))


def test_a_method_may_have_a_table_and_a_field_of_its_own() -> None:
    assert default_targets(of_type("mine"), {"mine": ["ff"]}, "feedforward_modules") == ["ff"]
    with pytest.raises(TargetError, match=r"`feedforward_modules` \(=None\)"):
        default_targets(of_type("gpt2"), {"mine": ["ff"]}, "feedforward_modules")


def test_a_heads_fresh_first_layer_is_trained_where_the_model_has_it() -> None:
    plain, distil = nn.Module(), nn.Module()
    distil.pre_classifier = nn.Linear(2, 2)
    usual = TASK_HEADS["SEQ_CLS"]
    assert task_heads(plain, usual) == ["classifier", "score"]
    assert task_heads(distil, usual) == ["classifier", "score", "pre_classifier"]
    assert task_heads(distil, ()) == []
