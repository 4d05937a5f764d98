"""transformers' own methods for adapters, unmodified, with Multigraft in PEFT's place."""

from __future__ import annotations

from typing import Any

import pytest

from tests.compat.running import Facts, differences, facts_of

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    return facts_of("text_models", tmp_path_factory)


@pytest.fixture
def found(facts: Facts) -> dict[str, Any]:
    return facts.aliased


def test_everything_is_as_with_peft(facts: Facts) -> None:
    assert differences(facts) == {}


def test_transformers_finds_peft(found: dict[str, Any]) -> None:
    assert found["transformers sees PEFT"]


def test_an_added_adapter_acts_and_is_switched_off_and_on(found: dict[str, Any]) -> None:
    assert found["it acts"]
    assert (found["disabled"], found["enabled"]) == (0.0, 0.0)


def test_a_new_adapter_is_active_and_the_only_one_that_trains(found: dict[str, Any]) -> None:
    assert found["the new one is active"] == ["two"]
    assert found["the new one trains"] and all(".two." in n for n in found["the new one trains"])


def test_set_adapter_takes_one_or_several(found: dict[str, Any]) -> None:
    assert found["both"] == [["default", "two"], True]
    distance, trained = found["the first again"]
    assert distance == 0.0 and all(".default." in name for name in trained)


def test_saving_writes_the_adapter_alone(found: dict[str, Any]) -> None:
    files = ["adapter_config.json", "adapter_model.safetensors"]
    assert [name for name in found["files"] if name.startswith("adapter")] == files
    assert "model.safetensors" not in found["files"]
    assert len(found["keys"]) == 8 and all(".lora_" in key for key in found["keys"])


def test_the_last_deletion_leaves_the_base_and_no_trace(found: dict[str, Any]) -> None:
    assert found["one is left"] == [["default"], 0.0]
    assert found["none is left"] == [False, False]
    assert found["the base again"] == 0.0


def test_a_folder_is_loaded_without_a_missing_tensor(found: dict[str, Any]) -> None:
    assert found["load report"] == ["LoadStateDictInfo", []]
    assert found["loaded"] == [0.0, []]  # for inference: nothing trains


def test_a_second_folder_is_loaded_beside_the_first(found: dict[str, Any]) -> None:
    names, distance, trained = found["loaded beside"]
    assert names == ["default", "again"] and distance == 0.0
    assert trained and all(".again." in name for name in trained)
    assert found["the first was kept"] == 0.0
    assert found["second load report"] == "LoadStateDictInfo"  # transformers' own way, again


def test_tensors_are_loaded_and_swapped(found: dict[str, Any]) -> None:
    assert found["from tensors"] == 0.0
    assert found["changed"] and found["swapped in"] == 0.0


def test_from_pretrained_takes_an_adapters_folder(found: dict[str, Any]) -> None:
    assert found["from_pretrained"] == [0.0, True]
    assert found["its kind"]


@pytest.mark.parametrize("what", ["saved module", "tokens"])
def test_what_is_trained_beside_is_loaded_as_well(found: dict[str, Any], what: str) -> None:
    assert found[what] == [0.0, []]
    assert found[f"{what}: acts"]


def test_the_trainer_saves_adapters(found: dict[str, Any]) -> None:
    assert found["trained"]
    assert found["checkpoint"] == ["adapter_config.json", "adapter_model.safetensors"]


def test_the_best_checkpoint_comes_back_and_training_goes_on_which_fails_with_peft(
    facts: Facts,
) -> None:
    assert facts.aliased["beyond PEFT: steps"] == 3
    assert facts.with_peft["beyond PEFT: steps"] == "pytorch_model.bin"  # else say so no more
