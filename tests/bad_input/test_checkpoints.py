"""Tensors and configs of another adapter or another base: refused, and nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from multigraft import (
    CheckpointError,
    ConfigError,
    MultigraftError,
    MultigraftWarning,
    PeftModel,
    TargetError,
    UnsupportedError,
    get_peft_model,
    set_peft_model_state_dict,
)
from multigraft.methods.ia3 import IA3Config
from tests.bad_input.loading import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    beside_another,
    refused,
    resettle,
    rewrite,
    ways,
)
from tests.weaknesses import nets

# Tensors of another adapter. One of each kind, through every way, is in `tests/weaknesses` (T24).

UP = f"{PREFIX}blocks.0.up.lora_A.weight"


def several(tensors: dict[str, Tensor]) -> None:
    """Every kind of misfit in one file."""
    del tensors[f"{PREFIX}head.bias"]
    tensors["stray"] = torch.ones(1)
    tensors[UP] = torch.ones(3, 8)
    tensors[f"{PREFIX}conv.lora_B.weight"].fill_(float("nan"))


@ways
def test_every_misfit_is_named_in_one_message(way: Callable[..., Any], folder: Path) -> None:
    rewrite(folder, several)
    message = refused(CheckpointError, *way(folder), folder)
    assert f"missing from the file: {PREFIX}head.bias;" in message
    assert "not part of this adapter on this model: stray;" in message
    assert f"NaN or infinity in: {PREFIX}conv.lora_B.weight;" in message
    assert f"of another shape than the model needs: {UP} (3, 8) instead of (2, 8)." in message
    assert "Nothing was changed. Pass strict=False (ignore_mismatched_sizes=True" in message


def test_a_state_dict_that_does_not_fit_is_refused_alike(folder: Path) -> None:
    model = get_peft_model(nets.net(), CONFIG)
    rewrite(folder, several)
    tensors = load_file(folder / WEIGHTS)
    attempt = lambda: set_peft_model_state_dict(model, tensors)  # noqa: E731
    message = refused(CheckpointError, model, attempt, folder)
    assert f"{PREFIX}head.bias" in message
    assert f"{UP} (3, 8) instead of (2, 8)" in message


@ways
def test_a_file_without_tensors_is_refused(way: Callable[..., Any], folder: Path) -> None:
    save_file({}, folder / WEIGHTS, {"format": "pt"})
    message = refused(CheckpointError, *way(folder), folder)
    assert "missing from the file" in message


@ways
def test_two_tensors_of_one_meaning_are_refused(way: Callable[..., Any], folder: Path) -> None:
    rewrite(folder, lambda t: t.update({UP.replace(PREFIX, f"{PREFIX}_orig_mod."): t[UP] * 2}))
    message = refused(CheckpointError, *way(folder), folder)
    assert "two tensors mean `blocks.0.up.lora_A.weight`" in message


@ways
def test_a_mapping_of_two_keys_to_one_is_refused(way: Callable[..., Any], folder: Path) -> None:
    mapping = {r"blocks\.\d\.": "blocks.0."}
    message = refused(CheckpointError, *way(folder, key_mapping=mapping), folder)
    assert "`key_mapping`: two tensors mean `blocks.0.up.lora_A.weight`" in message


@ways
def test_a_mapping_that_is_no_expression_is_refused(way: Callable[..., Any], folder: Path) -> None:
    message = refused(ConfigError, *way(folder, key_mapping={"blocks(": ""}), folder)
    assert "`key_mapping` (='blocks(') is read as a regular expression and is not one" in message


@ways
def test_an_option_that_does_not_exist_is_refused(way: Callable[..., Any], folder: Path) -> None:
    message = refused(CheckpointError, *way(folder, revison="main"), folder)
    assert "unknown options ['revison']; known are revision," in message


# Configs of another adapter.

IA3 = {"peft_type": "IA3", "target_modules": ["up"], "feedforward_modules": []}


@ways
@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"r": 3}, CheckpointError, "(2, 8) instead of (3, 8)"),
        ({"target_modules": ["up", "down"]}, CheckpointError, f"{PREFIX}blocks.0.down.lora_A"),
        ({"modules_to_save": None}, CheckpointError, f"{PREFIX}head.weight"),
        ({"modules_to_save": ["norm"]}, CheckpointError, f"{PREFIX}norm.weight"),
        ({"target_modules": ["up"], "lora_bias": True}, CheckpointError, "up.lora_B.bias"),
        ({"use_dora": True}, CheckpointError, "lora_magnitude_vector"),
        (IA3, CheckpointError, f"{PREFIX}blocks.0.up.ia3_l"),
        ({"peft_type": "LOHA", "target_modules": ["up"]}, CheckpointError, "up.hada_w1_a"),
        ({"peft_type": "LOHA"}, TargetError, "LOHA cannot adapt embed (Embedding)"),
        ({"peft_type": "lora"}, MultigraftError, "`lora` is unknown. Nearest: `LORA`"),
        ({"target_modules": ["query"]}, TargetError, "no module is called `query`"),
        ({"target_modules": {"up": 1}}, ConfigError, "(={'up': 1}) must be a list"),
        ({"use_rslora": "false"}, ConfigError, "`use_rslora` (='false') must be True or False"),
        ({"use_dora": 1}, ConfigError, "`use_dora` (=1) must be True or False"),
        ({"lora_alpha": "16"}, ConfigError, "`lora_alpha` (='16') must be a finite number"),
    ],
    ids=str,
)
def test_a_config_that_is_not_the_tensors_own_is_refused(
    values: dict[str, Any],
    error: type[MultigraftError],
    words: str,
    way: Callable[..., Any],
    folder: Path,
) -> None:
    resettle(folder, **values)
    message = refused(error, *way(folder), folder)
    assert words in message


@pytest.mark.parametrize("given", ["LORA", {"r": 2}, 3], ids=repr)
def test_a_given_config_that_is_none_is_refused(given: object, folder: Path) -> None:
    model, attempt = beside_another(folder, config=given)
    message = refused(UnsupportedError, model, attempt, folder)
    assert f"`peft_config` (={type(given).__name__}) must be a config of Multigraft" in message


def test_a_given_config_of_another_method_is_refused(folder: Path) -> None:
    config = IA3Config(target_modules=["up"], feedforward_modules=[])
    model, attempt = beside_another(folder, config=config)
    assert "blocks.0.up.ia3_l" in refused(CheckpointError, model, attempt, folder)


def test_reading_a_config_as_another_methods_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"`peft_type` \(='LORA'\) is not what IA3Config"):
        IA3Config.from_pretrained(folder)


# Another base.


def named(name: str | None) -> Any:
    base = nets.net()
    if name is not None:
        base.name_or_path = name
    return base


def test_a_base_of_another_name_is_warned_of_once_with_both_names(tmp_path: Path) -> None:
    get_peft_model(named("org/small"), CONFIG).save_pretrained(tmp_path)
    with pytest.warns(MultigraftWarning) as caught:
        PeftModel.from_pretrained(named("org/large"), tmp_path)
    (warning,) = caught
    assert "trained on `org/small` and is loaded onto `org/large`" in str(warning.message)


@pytest.mark.filterwarnings("error::multigraft.MultigraftWarning")
@pytest.mark.parametrize("name", ["org/small", "/somewhere/else/small", "small", "", None])
def test_the_same_base_from_elsewhere_or_without_a_name_is_no_reason_to_warn(
    name: str | None, tmp_path: Path
) -> None:
    get_peft_model(named("org/small"), CONFIG).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(named(name), tmp_path)
    assert loaded.peft_config["default"].base_model_name_or_path == "org/small"


def test_a_base_of_another_width_is_refused_by_shape(folder: Path) -> None:
    narrow = nets.net()
    narrow.head = torch.nn.Linear(nets.WIDTH, 5)
    attempt = lambda: PeftModel.from_pretrained(narrow, folder)  # noqa: E731
    message = refused(CheckpointError, narrow, attempt, folder)
    assert f"{PREFIX}head.weight (6, 8) instead of (5, 8)" in message
