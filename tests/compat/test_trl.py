"""TRL's trainers, unmodified, with Multigraft in PEFT's place."""

from __future__ import annotations

from typing import Any

import pytest

from tests.compat.running import Facts, differences, facts_of

pytest.importorskip("trl")
FILES = ["adapter_config.json", "adapter_model.safetensors"]


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    return facts_of("trl_trainers", tmp_path_factory)


@pytest.fixture
def found(facts: Facts) -> dict[str, Any]:
    return facts.aliased


def test_everything_is_as_with_peft(facts: Facts) -> None:
    assert differences(facts) == {}


def test_sft_wraps_trains_and_saves_the_adapter(found: dict[str, Any]) -> None:
    assert found["sft: model"] == "PeftModelForCausalLM"
    assert found["sft: checkpoint"] == FILES
    assert found["sft: learned"] and found["sft: reloaded"] == 0.0


def test_sft_goes_on_from_a_checkpoint(found: dict[str, Any]) -> None:
    assert found["sft: resumed"] == 4


def test_dpo_needs_no_second_model(found: dict[str, Any]) -> None:
    assert found["dpo: reference is the base"]
    assert found["dpo: checkpoint"] == FILES


def test_dpo_of_a_trained_adapter_keeps_a_copy_as_its_reference(found: dict[str, Any]) -> None:
    assert found["dpo: adapters"] == ["default", "ref"]
    assert found["dpo: trained"] == [["default"], True]
    assert found["dpo: the reference stayed"] == 0.0


def test_trl_refuses_what_it_refuses(found: dict[str, Any]) -> None:
    assert found["refused: a dictionary"].startswith("TypeError: `peft_config` must be")
    assert found["refused: the head"].startswith("ValueError: Applying a PEFT adapter to `lm_head`")
