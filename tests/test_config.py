"""Configs: to a file and back, copies, and values per site. Bad ones are in `bad_input`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
from peft.utils.other import get_pattern_key

import multigraft
from multigraft import ConfigError, LoraConfig, PeftConfig, PeftType, TaskType
from multigraft.config import CONFIGS, check_patterns, matching_pattern, pattern_value

RICH: dict[str, Any] = {
    "task_type": "CAUSAL_LM",
    "target_modules": ["q_proj", "v_proj"],
    "exclude_modules": "lm_head",
    "modules_to_save": ["head"],
    "layers_to_transform": [0, 2],
    "layers_pattern": "layers",
    "r": 4,
    "lora_alpha": 2.5,
    "rank_pattern": {"q_proj": 8},
    "bias": "lora_only",
    "base_model_name_or_path": "someone/base",
}


def test_what_a_dictionary_holds_comes_back() -> None:
    config = LoraConfig(**RICH)
    again = PeftConfig.from_dict(config.to_dict())
    assert again == config
    assert type(again) is LoraConfig


def test_the_files_text_is_pefts_for_the_same_options(tmp_path: Path) -> None:
    peft.LoraConfig(**RICH).save_pretrained(tmp_path / "theirs")
    LoraConfig(**RICH).save_pretrained(tmp_path / "ours")
    ours, theirs = ((tmp_path / d / "adapter_config.json").read_text() for d in ("ours", "theirs"))
    sets = {"target_modules": sorted(RICH["target_modules"])}  # sets have no order in PEFT
    assert json.loads(ours) | sets == json.loads(theirs) | sets | {"inference_mode": True}
    assert ours.splitlines()[0] == theirs.splitlines()[0] == "{"
    assert list(json.loads(ours)) == sorted(json.loads(ours))


def test_a_file_says_inference_and_the_config_that_wrote_it_does_not_change() -> None:
    config = LoraConfig(**RICH)
    assert json.loads(config.to_json())["inference_mode"] is True
    assert config.inference_mode is False


def test_a_config_is_read_from_a_folder_and_from_a_subfolder(tmp_path: Path) -> None:
    LoraConfig(r=3).save_pretrained(tmp_path)
    LoraConfig(r=5).save_pretrained(tmp_path / "deep")
    assert PeftConfig.from_pretrained(tmp_path).r == 3  # type: ignore[attr-defined]
    assert LoraConfig.from_pretrained(tmp_path, subfolder="deep").r == 5  # type: ignore[attr-defined]


def test_a_copy_shares_nothing_with_its_original() -> None:
    config = LoraConfig(**RICH)
    twin = config.copy()
    assert isinstance(twin, LoraConfig)
    assert twin == config
    twin.target_modules.append("k_proj")  # type: ignore[union-attr]
    twin.rank_pattern["v_proj"] = 1
    assert config == LoraConfig(**RICH)


def test_the_callers_lists_and_dictionaries_are_not_the_configs() -> None:
    names, ranks = ["q_proj"], {"q_proj": 2}
    config = LoraConfig(target_modules=names, rank_pattern=ranks)
    names.append("v_proj")
    ranks["v_proj"] = 1
    assert (config.target_modules, config.rank_pattern) == (["q_proj"], {"q_proj": 2})


@pytest.mark.parametrize("value", [{"b", "a"}, ("b", "a", "b"), ["b", "a"], iter(["b", "a"])])
def test_names_become_a_list_without_repeats_and_sets_are_sorted(value: Any) -> None:
    expected = ["a", "b"] if isinstance(value, set) else ["b", "a"]
    assert LoraConfig(target_modules=value).target_modules == expected


@pytest.mark.parametrize("value", ["all-linear", "ALL-LINEAR", "All-Linear", ["all-linear"]])
def test_all_linear_may_be_written_in_any_case(value: Any) -> None:
    assert LoraConfig(target_modules=value).target_modules == "all-linear"


@pytest.mark.parametrize("value", [["all-linear", "head"], ["head", "ALL-LINEAR"]])
def test_all_linear_beside_other_names_is_refused_in_any_case(value: list[str]) -> None:
    with pytest.raises(ConfigError, match='"all-linear" stands alone'):
        LoraConfig(target_modules=value)


def test_one_saved_module_may_be_given_by_its_name_alone() -> None:
    assert LoraConfig(modules_to_save="head").modules_to_save == ["head"]  # type: ignore[arg-type]


@pytest.mark.parametrize("enum", [TaskType, PeftType])
def test_enums_are_their_names_in_texts_and_comparisons(enum: Any) -> None:
    for member in enum:
        assert f"{member}" == member == member.value


def test_every_registered_method_has_a_type_and_a_config_that_says_it() -> None:
    for name, config in CONFIGS.items():
        assert PeftType(name) == name
        assert issubclass(config, PeftConfig)
    assert CONFIGS["LORA"] is LoraConfig


def test_a_method_of_ones_own_joins_the_types_and_its_files_are_read() -> None:
    class Mine(PeftConfig):
        pass

    CONFIGS.register("MINE", Mine)
    try:
        assert type(PeftConfig.from_dict({"peft_type": "MINE"})) is Mine
        assert PeftType("MINE") == "MINE"
    finally:
        CONFIGS.unregister("MINE")


PATTERNS = {"q_proj": 1, r"layers\.[01]\.v_proj": 2, "^head": 3, "k|v_proj": 4}


PATHS = {
    "q_proj": 1,
    "layers.0.q_proj": 1,
    "layers.0.my_q_proj": 0,
    "layers.0.v_proj": 2,
    "model.layers.1.v_proj": 2,
    "layers.7.v_proj": 4,
    "a.k": 4,
    "head": 3,
    "head.dense": 0,
}


@pytest.mark.parametrize(("path", "value"), PATHS.items())
def test_a_pattern_matches_whole_components_up_to_the_end_and_the_first_one_wins(
    path: str, value: int
) -> None:
    assert pattern_value(PATTERNS, path, 0) == value


@pytest.mark.parametrize("path", PATHS)
def test_patterns_mean_what_they_mean_in_peft(path: str) -> None:
    theirs = PATTERNS.get(get_pattern_key(PATTERNS, path))
    assert pattern_value(PATTERNS, path, None) == theirs
    assert (matching_pattern(PATTERNS, path) is None) == (theirs is None)


def test_patterns_are_copied_and_none_stands_for_no_exception() -> None:
    given = {"q": 1}
    assert check_patterns("X", "rank_pattern", given) == given
    assert check_patterns("X", "rank_pattern", given) is not given
    assert check_patterns("X", "rank_pattern", None) == {}


def test_every_registered_config_is_public() -> None:
    names = {config.__name__ for _, config in CONFIGS.items()}
    assert names <= set(multigraft.__all__)
