"""Configs that cannot mean anything: refused at once, with value, requirement and remedy."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from multigraft import (
    AdaLoraConfig,
    ConfigError,
    LoraConfig,
    LoraRuntimeConfig,
    MultigraftError,
    MultigraftWarning,
    PeftConfig,
    PeftModel,
    TargetError,
    UnsupportedError,
    get_peft_model,
)
from tests.weaknesses import nets

RANK = "an integer of at least 1"
BAD_VALUES: list[tuple[dict[str, Any], str]] = [
    *[({"r": r}, RANK) for r in (0, -3, 2.0, 2.5, "8", True, None)],
    ({"rank_pattern": {"up": 0}}, RANK),
    ({"rank_pattern": {"up": 1.5}}, RANK),
    ({"rank_pattern": ["up"]}, "a dictionary from module patterns to values"),
    ({"rank_pattern": {"up(": 2}}, "read as a regular expression and is not one"),
    ({"rank_pattern": {3: 2}}, "keyed by strings"),
    *[({"lora_alpha": a}, "a finite number") for a in (math.nan, math.inf, -math.inf, "16", None)],
    ({"alpha_pattern": {"up": math.nan}}, "a finite number"),
    ({"alpha_pattern": {"*": 2}}, "read as a regular expression and is not one"),
    *[
        ({"lora_dropout": p}, "a number of at least 0 and below 1")
        for p in (-0.1, 1.0, 1.5, math.nan, "0.1", None)
    ],
    ({"bias": "lora"}, "must be one of 'none', 'all', 'lora_only'. Nearest: `lora_only`"),
    ({"bias": None}, "must be one of 'none', 'all', 'lora_only'"),
    ({"init_lora_weights": "gausian"}, "Nearest: `gaussian`"),
    ({"init_lora_weights": "pisa"}, "Nearest: `pissa`"),
    ({"task_type": "CAUSAL"}, "must be one of SEQ_CLS, SEQ_2_SEQ_LM, CAUSAL_LM"),
    ({"peft_type": "LORRA"}, "Nearest: `LORA`"),
    ({"target_modules": 5}, "must be a list of non-empty strings, or a string"),
    ({"target_modules": ["up", ""]}, "must be a list of non-empty strings, or a string"),
    ({"target_modules": ("up", 3)}, "must be a list of non-empty strings, or a string"),
    ({"target_modules": "up("}, "To name modules, give a list: ['up(']"),
    ({"exclude_modules": "*up"}, "read as a regular expression and is not one"),
    ({"modules_to_save": [None]}, "must be a list of non-empty strings, or a string"),
    ({"layers_to_transform": [-1]}, "indices of layers: integers from 0"),
    ({"layers_to_transform": ["1"]}, "indices of layers: integers from 0"),
    ({"layers_to_transform": 1.0}, "indices of layers: integers from 0"),
    ({"layers_pattern": "h(", "layers_to_transform": [1]}, r"meant literally, write 'h\\('"),
    ({"layers_pattern": ["h", "l("], "layers_to_transform": 1}, "`layers_pattern` (='l(')"),
    ({"layers_pattern": "layers"}, "`layers_to_transform`"),
    ({"target_modules": r".*up", "layers_to_transform": [0]}, "`layers_to_transform`"),
]


@pytest.mark.parametrize(("fields", "required"), BAD_VALUES, ids=lambda v: str(v)[:50])
def test_a_value_outside_its_field_is_refused_with_value_and_requirement(
    fields: dict[str, Any], required: str
) -> None:
    with pytest.raises((ConfigError, UnsupportedError)) as caught:
        LoraConfig(**fields)
    message = str(caught.value)
    name, value = next(iter(fields.items()))
    shown = next(iter(value.items())) if isinstance(value, dict) else (name, value)
    assert name in message
    assert required in message
    if "layers_pattern" not in fields and not isinstance(value, (set, dict)):
        assert repr(shown[1]) in message


def test_a_refused_config_is_a_value_error_and_one_of_ours() -> None:
    with pytest.raises(ValueError) as caught:
        LoraConfig(r=0)
    assert isinstance(caught.value, MultigraftError)
    assert str(caught.value) == "LoraConfig: `r` (=0) must be an integer of at least 1."


@pytest.mark.parametrize("alpha", [0, -2, 0.5, 1e30])
def test_any_finite_alpha_is_allowed(alpha: float) -> None:
    model = get_peft_model(nets.net(), LoraConfig(r=2, lora_alpha=alpha, target_modules=["up"]))
    assert nets.layer(model, "blocks.0.up").scaling["default"] == alpha / 2


SET_VALUES: dict[str, Any] = {
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 2},
    "corda_config": {"corda_method": "ipm"},
    "ensure_weight_tying": True,
    "eva_config": {"rho": 2.0},
    "kasa_config": {"beta": 1.0},
    "layer_replication": [(0, 1), (0, 2)],
    "loftq_config": {"loftq_bits": 4},
    "lora_ga_config": {"direction": "ArB2r"},
    "megatron_config": {"tensor_model_parallel_size": 2},
    "monteclora_config": {"sample": 2},
    "runtime_config": {"ephemeral_gpu_offload": True},
    "target_parameters": ["experts.up"],
    "trainable_token_indices": [3],
    "use_bdlora": {"nblocks": 2},
    "use_dora": True,
    "use_qalora": True,
    "velora_config": {"rank": 1},
}
"""A value that sets each field of PEFT's LoRA config that may not be built."""

BUILT = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules"),
    *("fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "r"),
    *("layers_to_transform", "lora_alpha", "lora_bias", "lora_dropout", "modules_to_save"),
    *("peft_type", "peft_version", "rank_pattern", "revision", "target_modules", "task_type"),
    "use_rslora",
}
COMPANIONS = {"qalora_group_size": "use_qalora", "megatron_core": "megatron_config"}
"""Fields that mean nothing unless another one is set, which is refused."""

unbuilt = pytest.mark.parametrize("field", sorted(AdaLoraConfig._unbuilt))
"""AdaLoRA's config has all of LoRA's fields, in PEFT too, and not all of them mean something."""


@unbuilt
def test_an_option_of_peft_that_is_not_built_is_refused_by_name(field: str) -> None:
    value = SET_VALUES.get(field, True)
    with pytest.raises(ConfigError) as caught:
        AdaLoraConfig(target_modules=["up"], total_step=9, **{field: value})
    message = str(caught.value)
    assert f"`{field}` (={value!r})" in message
    assert f"Leave it at {AdaLoraConfig._unbuilt[field]!r}" in message


@pytest.mark.parametrize("field", sorted(AdaLoraConfig._unbuilt.keys() - {"runtime_config"}))
def test_a_file_that_sets_an_option_that_is_not_built_is_refused_by_name(
    field: str, tmp_path: Path
) -> None:
    config = AdaLoraConfig(init_r=2, target_modules=["up"], total_step=9)
    get_peft_model(nets.net(), config).save_pretrained(tmp_path)
    rewrite(tmp_path, {field: SET_VALUES.get(field, True)})
    model = nets.net()
    before = nets.known(model)
    with pytest.raises(ConfigError, match=f"`{field}`"):
        PeftModel.from_pretrained(model, tmp_path)
    nets.assert_as_before(model, before)


@unbuilt
def test_the_neutral_value_of_an_option_that_is_not_built_is_accepted(field: str) -> None:
    fields = {f.name: f for f in dataclasses.fields(peft.AdaLoraConfig)}
    default = fields[field].default
    default = fields[field].default_factory() if default is dataclasses.MISSING else default
    assert getattr(AdaLoraConfig(total_step=9, **{field: default}), field) == default


@pytest.mark.parametrize("off", [{"ephemeral_gpu_offload": False}, {}, None, LoraRuntimeConfig()])
def test_a_runtime_config_may_be_said_in_any_way(off: Any) -> None:
    assert LoraConfig(runtime_config=off).runtime_config == LoraRuntimeConfig()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"ephemeral_gpu": True}, "no option `ephemeral_gpu`. Nearest: `ephemeral_gpu_offload`"),
        ({"ephemeral_gpu_offload": "yes"}, "`ephemeral_gpu_offload` (='yes') must be True or"),
        (3, "`runtime_config` (=3) must be a LoraRuntimeConfig, or a dictionary"),
    ],
)
def test_a_runtime_config_that_means_nothing_is_refused(value: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        LoraConfig(runtime_config=value)


@pytest.mark.parametrize("field", ["eva_config", "arrow_config", "loftq_config"])
def test_a_table_that_switches_an_option_on_is_refused_whatever_it_holds(field: str) -> None:
    with pytest.raises(ConfigError, match=f"`{field}`"):
        LoraConfig(**{field: {"anything": False}})


def test_every_field_of_the_installed_peft_is_built_or_refused_or_a_companion() -> None:
    theirs = {f.name for f in dataclasses.fields(peft.LoraConfig)}
    ours = {f.name for f in dataclasses.fields(LoraConfig)}
    assert theirs - ours == set()
    assert theirs - BUILT - set(COMPANIONS) - set(SET_VALUES) == set()
    assert set(COMPANIONS.values()) <= set(SET_VALUES)
    assert LoraConfig._unbuilt == {}


def test_an_unknown_field_of_the_constructor_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="rank"):
        LoraConfig(rank=3)  # type: ignore[call-arg]


def rewrite(folder: Path, values: dict[str, Any], drop: tuple[str, ...] = ()) -> None:
    """Change keys of a saved adapter's config."""
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text()) | values
    file.write_text(json.dumps({k: v for k, v in config.items() if k not in drop}))


def test_unknown_keys_of_a_file_are_kept_named_and_written_back(tmp_path: Path) -> None:
    get_peft_model(nets.net(), LoraConfig(r=2, target_modules=["up"])).save_pretrained(tmp_path)
    rewrite(tmp_path, {"new_option": {"a": [1, 2]}, "peft_version": "9.9", "other": None})
    with pytest.warns(MultigraftWarning) as caught:
        model = PeftModel.from_pretrained(nets.net(), tmp_path)
    (warning,) = caught
    assert "unknown keys `new_option`, `other`" in str(warning.message)
    assert "'9.9'" in str(warning.message)
    model.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert written["new_option"] == {"a": [1, 2]}
    assert written["other"] is None


@pytest.mark.parametrize("version", ["0.22.0", "1.0", "0.21.3.dev0", "10"])
def test_a_file_of_a_newer_version_says_so_even_if_every_key_is_known(
    version: str, tmp_path: Path
) -> None:
    get_peft_model(nets.net(), LoraConfig(r=2, target_modules=["up"])).save_pretrained(tmp_path)
    rewrite(tmp_path, {"peft_version": version})
    with pytest.warns(MultigraftWarning) as caught:
        PeftModel.from_pretrained(nets.net(), tmp_path)
    (warning,) = caught
    assert f"was written by version '{version}'; Multigraft follows '0.21.2'" in str(
        warning.message
    )


@pytest.mark.parametrize("version", ["0.21.2", "0.21.2.dev0", "0.9.1@abc", None, "unknown"])
@pytest.mark.filterwarnings("error::multigraft.MultigraftWarning")
def test_a_file_of_this_or_an_older_version_gives_no_warning(
    version: str | None, tmp_path: Path
) -> None:
    get_peft_model(nets.net(), LoraConfig(r=2, target_modules=["up"])).save_pretrained(tmp_path)
    rewrite(tmp_path, {"peft_version": version})
    assert PeftModel.from_pretrained(nets.net(), tmp_path).peft_config["default"].r == 2


@pytest.mark.parametrize(
    ("values", "drop", "error", "words"),
    [
        ({}, ("peft_type",), ConfigError, "has no `peft_type`"),
        ({"peft_type": None}, (), ConfigError, "has no `peft_type`"),
        ({"peft_type": "LORAX"}, (), UnsupportedError, "`LORAX` is unknown. Nearest: `LORA`"),
        ({"peft_type": "XLORA"}, (), UnsupportedError, "`XLORA` is unknown. Nearest: `LORA`"),
        ({"peft_type": 7}, (), UnsupportedError, "`7` is unknown"),
        ({"r": -1}, (), ConfigError, "`r` (=-1) must be an integer of at least 1"),
        ({"target_modules": None}, (), TargetError, "target_modules"),
        ({"target_modules": ["nowhere"]}, (), TargetError, "no module is called `nowhere`"),
    ],
)
def test_a_files_config_that_cannot_be_meant_is_refused(
    values: dict[str, Any],
    drop: tuple[str, ...],
    error: type[Exception],
    words: str,
    tmp_path: Path,
) -> None:
    get_peft_model(nets.net(), LoraConfig(r=2, target_modules=["up"])).save_pretrained(tmp_path)
    rewrite(tmp_path, values, drop)
    model = nets.net()
    before = nets.known(model)
    with pytest.raises(error) as caught:
        PeftModel.from_pretrained(model, tmp_path)
    assert words in str(caught.value)
    nets.assert_as_before(model, before)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '"LORA"', "\x00\x01", '{"r": 1,}'])
def test_a_damaged_config_file_is_refused_and_named(text: str, tmp_path: Path) -> None:
    get_peft_model(nets.net(), LoraConfig(r=2, target_modules=["up"])).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"adapter_config\.json"):
        PeftModel.from_pretrained(nets.net(), tmp_path)


def test_a_config_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match="not valid JSON"):
        PeftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("layer", "kind"), [(nn.LayerNorm(8), "LayerNorm"), (nn.GRU(8, 8), "GRU"), (nn.ReLU(), "ReLU")]
)
def test_a_layer_that_lora_cannot_adapt_is_refused_with_what_it_can(
    layer: nn.Module, kind: str
) -> None:
    model = nets.net()
    model.odd = layer
    before = nets.known(model)
    with pytest.raises(TargetError, match=rf"LORA cannot adapt odd \({kind}\).*linear.*exclude"):
        get_peft_model(model, LoraConfig(target_modules=["up", "odd"]))
    nets.assert_as_before(model, before)


def test_a_rank_that_a_grouped_convolution_cannot_take_is_refused() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2))
    with pytest.raises(TargetError, match=r"0: `rank` \(=3\) must be a multiple .*`groups` \(=2\)"):
        get_peft_model(model, LoraConfig(r=3, target_modules=["0"]))


def test_a_config_of_another_library_is_refused_with_the_import_to_change() -> None:
    theirs = peft.LoraConfig(target_modules=["up"])
    with pytest.raises(UnsupportedError, match=r"`peft_config` \(=LoraConfig\).*multigraft"):
        get_peft_model(nets.net(), theirs)  # type: ignore[arg-type]


def test_all_linear_on_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(TargetError, match="has no linear layer besides its output head"):
        get_peft_model(nn.Sequential(nn.ReLU()), LoraConfig(target_modules="all-linear"))


def test_no_targets_on_an_unknown_architecture_are_asked_for() -> None:
    with pytest.raises(TargetError, match="`target_modules`"):
        get_peft_model(nets.net(), LoraConfig())


def test_saving_a_module_without_parameters_is_refused() -> None:
    model = nets.net()
    model.odd = nn.ReLU()
    with pytest.raises(TargetError, match=r"`modules_to_save`: odd has no parameters"):
        get_peft_model(model, LoraConfig(target_modules=["up"], modules_to_save=["odd"]))
    torch.testing.assert_close(model(nets.ids()), nets.net()(nets.ids()))
