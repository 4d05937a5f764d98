"""What goes into an adapter's files when it takes a part out of the base's weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import multigraft
from multigraft import (
    CheckpointError,
    ConfigError,
    IA3Config,
    LoraConfig,
    MultigraftWarning,
    PeftModel,
    get_peft_model,
)
from tests.initialisations.nets import batch, net, off, options, ours, theirs, train
from tests.oracle import build, llama, quiet

CASES: list[tuple[str, dict[str, Any]]] = [
    ("pissa", {}),
    ("olora", {"rank_pattern": {"second": 6}, "alpha_pattern": {"first": 3}}),
    ("pissa", {"use_rslora": True}),
    ("pissa_niter_4", {}),
]


def converted(model: Any, init: str, folder: Path) -> Any:
    """The model, trained and saved as plain LoRA, as PEFT's documentation has it."""
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(folder / "initial")
    model.peft_config["default"].init_lora_weights = init
    train(model)
    with quiet():
        model.save_pretrained(
            folder / "plain", path_initial_model_for_weight_conversion=str(folder / "initial")
        )
    return model


@pytest.mark.parametrize(("init", "more"), CASES)
def test_the_converted_file_means_the_same_to_either_library(
    init: str, more: dict[str, Any], tmp_path: Path
) -> None:
    model = converted(ours(init, **more), init, tmp_path)
    again = PeftModel.from_pretrained(net(), tmp_path / "plain").eval()
    with quiet():
        read = peft.PeftModel.from_pretrained(net(), str(tmp_path / "plain")).eval()
    assert off(again(batch()), model(batch())) < 1e-5
    assert off(read(batch()), model(batch())) < 1e-5


@pytest.mark.parametrize(("init", "more"), CASES[:3])
def test_conversion_writes_what_peft_writes(
    init: str, more: dict[str, Any], tmp_path: Path
) -> None:
    found = {}
    for name, make in (("ours", ours), ("theirs", theirs)):
        converted(make(init, **more), init, tmp_path / name)
        folder = tmp_path / name / "plain"
        config = json.loads((folder / "adapter_config.json").read_text())
        config["target_modules"] = sorted(config["target_modules"])
        found[name] = load_file(folder / "adapter_model.safetensors"), config
    (mine, my_config), (other, other_config) = found["ours"], found["theirs"]
    assert my_config == other_config
    assert mine.keys() == other.keys()
    assert all(off(mine[key], other[key]) < 1e-5 for key in mine)


def test_an_rslora_with_patterns_is_converted_where_peft_refuses(tmp_path: Path) -> None:
    more = {"use_rslora": True, "rank_pattern": {"second": 2}, "alpha_pattern": {"first": 3}}
    model = train(ours("pissa", **more))
    model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion=tmp_path / "unused")
    assert off(PeftModel.from_pretrained(net(), tmp_path)(batch()), model(batch())) < 1e-5
    with quiet(), pytest.raises(ValueError, match="not supported"):
        theirs("pissa", **more).save_pretrained(
            tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
        )


def test_a_dora_is_converted_to_a_dora_of_twice_the_rank(tmp_path: Path) -> None:
    model = train(ours("pissa", use_dora=True))
    model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion="unused")
    again = PeftModel.from_pretrained(net(), tmp_path).eval()
    assert again.peft_config["default"].r == 8
    assert off(again(batch()), model(batch())) < 1e-5


def test_an_alora_acts_from_its_invocation_as_its_converted_twin_does(tmp_path: Path) -> None:
    given = {"target_modules": ["q_proj"], "alora_invocation_tokens": [5, 6], "r": 2}
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights="pissa", **given)
    model = train(get_peft_model(build(llama).eval(), config).eval())
    model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion="unused")
    twin = PeftModel.from_pretrained(build(llama).eval(), tmp_path).eval()
    ids = torch.tensor([[3, 4, 5, 6, 7, 8]])
    found, base = model(ids).logits, build(llama).eval()(ids).logits
    assert off(found[:, :2], base[:, :2]) < 1e-6
    assert off(found[:, 3:], base[:, 3:]) > 1e-3
    assert off(twin(ids).logits, found) < 1e-5


def test_converting_leaves_the_adapter_as_it_is(tmp_path: Path) -> None:
    model = train(ours("olora"))
    before = model.peft_config["default"].to_dict(), model(batch())
    model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion="unused")
    assert model.peft_config["default"].to_dict() == before[0]
    assert (model(batch()) == before[1]).all()


def test_a_plain_adapter_is_converted_by_what_was_saved_before(tmp_path: Path) -> None:
    """``ΔW = B A - B₀ A₀`` of an adapter whose beginning is in a file alone."""
    model = train(ours(False), seed=1)
    model.save_pretrained(tmp_path / "initial")
    added = model(batch()) - net()(batch())
    train(model, seed=2)
    model.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "initial"
    )
    states = [load_file(tmp_path / n / "adapter_model.safetensors") for n in ("initial", "plain")]
    base = "base_model.model.first.lora_"
    A0, B0 = (states[0][f"{base}{name}.weight"] for name in "AB")
    A, B = (states[1][f"{base}{name}.weight"] for name in "AB")
    now = multigraft.get_peft_model_state_dict(model)
    expected = now[f"{base}B.weight"] @ now[f"{base}A.weight"] - B0 @ A0
    assert float(added.abs().max()) > 0
    assert off(B @ A, expected) < 1e-5


def test_a_folder_of_another_adapter_is_refused(tmp_path: Path) -> None:
    ours("olora").save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="is not where this adapter began"):
        ours("pissa").save_pretrained(
            tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "other"
        )
    assert not (tmp_path / "plain").exists()


def test_an_adapter_that_does_not_know_where_it_began_needs_the_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not know where it began\. Give the folder"):
        ours(True).save_pretrained(
            tmp_path, path_initial_model_for_weight_conversion=tmp_path / "none"
        )


def test_other_methods_are_not_converted(tmp_path: Path) -> None:
    config = IA3Config(target_modules=["first"], feedforward_modules=[])
    with pytest.raises(ConfigError, match="is IA3; only LoRA's initialisations are converted"):
        get_peft_model(net(), config).save_pretrained(
            tmp_path, path_initial_model_for_weight_conversion="initial"
        )


def test_a_loftq_adapter_is_not_converted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"LORA \(loftq\) at first is more than a pair"):
        ours("loftq").save_pretrained(tmp_path, path_initial_model_for_weight_conversion="initial")


def test_a_trained_adapter_whose_config_was_set_to_plain_is_saved_with_a_warning(
    tmp_path: Path,
) -> None:
    model = ours("pissa")
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "before")
    train(model)
    with pytest.warns(MultigraftWarning, match="its file means another output"):
        model.save_pretrained(tmp_path / "after")
    keys = load_file(tmp_path / "after" / "adapter_model.safetensors")
    assert not [key for key in keys if "initial" in key]


def test_the_config_of_a_converted_adapter_names_no_initialisation(tmp_path: Path) -> None:
    ours("pissa").save_pretrained(tmp_path, path_initial_model_for_weight_conversion="unused")
    config = LoraConfig.from_pretrained(tmp_path)
    expected = LoraConfig(**options(True, r=8, lora_alpha=12))
    assert (config.init_lora_weights, config.r, config.lora_alpha) == (
        expected.init_lora_weights,
        expected.r,
        expected.lora_alpha,
    )
