"""sentence-transformers' adapters, unmodified, with Multigraft in PEFT's place."""

from __future__ import annotations

from typing import Any

import pytest

from tests.compat.running import Facts, differences, facts_of

pytest.importorskip("sentence_transformers")


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    return facts_of("sentences", tmp_path_factory)


@pytest.fixture
def found(facts: Facts) -> dict[str, Any]:
    return facts.aliased


def test_everything_is_as_with_peft(facts: Facts) -> None:
    assert differences(facts) == {}


def test_an_adapter_acts_and_is_switched_off_and_on(found: dict[str, Any]) -> None:
    assert found["active"] == ["default"] and found["it acts"]
    assert (found["disabled"], found["enabled"]) == (0.0, 0.0)


def test_an_adapter_trains_and_is_saved_alone(found: dict[str, Any]) -> None:
    assert found["it trains"]
    assert found["checkpoint"] == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_saved_adapter_is_opened_on_its_base_or_loaded(found: dict[str, Any]) -> None:
    assert found["its base"]
    assert (found["opened"], found["loaded"], found["deleted"]) == (0.0, 0.0, 0.0)
    assert len(found["state"]) == 4
