"""Loading onto a model. What does not fit: `bad_input`, `weaknesses/test_t11_load_report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import multigraft
from multigraft import PeftModel, get_peft_model, get_peft_model_state_dict
from multigraft.loading import read_config
from tests.subject import Subject


def saved(folder: Path, name: str = "default", **options: Any) -> Path:
    """An adapter on the head, in files."""
    subject = Subject()
    model = get_peft_model(subject.base, subject.config(["head"], **options), name)
    model.save_pretrained(folder)
    return folder


def test_loading_draws_no_random_number(tmp_path: Path) -> None:
    saved(tmp_path, modules_to_save=["conv"], bias="all")
    subject, state = Subject(), torch.get_rng_state()
    PeftModel.from_pretrained(subject.base, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("is_trainable", [True, False])
def test_a_loaded_adapter_trains_if_wanted(tmp_path: Path, is_trainable: bool) -> None:
    model = PeftModel.from_pretrained(Subject().base, saved(tmp_path), is_trainable=is_trainable)
    assert model.roster.trains("default") is is_trainable
    assert model.peft_config["default"].inference_mode is not is_trainable
    assert model.active_adapters == ["default"]


def test_an_adapter_loaded_beside_another_waits_and_leaves_it_training(tmp_path: Path) -> None:
    subject = Subject()
    model = get_peft_model(subject.base, subject.config())
    model.load_adapter(saved(tmp_path), "second", is_trainable=True)
    assert model.active_adapters == ["default"]
    assert [model.roster.trains(n) for n in ("default", "second")] == [True, False]
    model.set_adapter("second")
    assert model.roster.trains("second")


def test_values_take_the_models_dtype_and_the_files_stay_as_they_are(tmp_path: Path) -> None:
    saved(tmp_path)  # in float64
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    subject = Subject()
    model = PeftModel.from_pretrained(subject.base.float(), tmp_path)
    assert {t.dtype for t in get_peft_model_state_dict(model).values()} == {torch.float32}
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before


def test_a_folder_that_holds_one_adapter_in_a_subfolder_means_it(tmp_path: Path) -> None:
    saved(tmp_path, "mine")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "mine"]
    _, options = read_config(tmp_path, "other", {})
    assert options == {"subfolder": "mine"}
    PeftModel.from_pretrained(Subject().base, tmp_path)


def test_of_several_subfolders_the_one_of_the_adapters_name_is_meant(tmp_path: Path) -> None:
    for name, rank in (("a", 1), ("b", 3)):
        saved(tmp_path, name, r=rank)
    config, options = read_config(tmp_path, "b", {"revision": "v1"})
    assert options == {"revision": "v1", "subfolder": "b"}
    assert config.r == 3  # type: ignore[attr-defined]


def test_a_config_in_the_folder_itself_wins_over_subfolders(tmp_path: Path) -> None:
    saved(tmp_path, r=2)
    saved(tmp_path, "a", r=1)
    config, options = read_config(tmp_path, "a", {})
    assert (options, config.r) == ({}, 2)  # type: ignore[attr-defined]
    config, _ = read_config(tmp_path, "default", {"subfolder": "a"})
    assert config.r == 1  # type: ignore[attr-defined]


def test_tensors_go_where_they_are_wanted(tmp_path: Path) -> None:
    subject = Subject()
    model = get_peft_model(subject.base, subject.config())
    model.load_adapter(saved(tmp_path), "second", torch_device="cpu")
    state = get_peft_model_state_dict(model, adapter_name="second")
    assert {t.device.type for t in state.values()} == {"cpu"}


def test_a_config_that_is_given_is_copied(tmp_path: Path) -> None:
    subject = Subject()
    config = subject.config(["head"])
    before = json.loads(config.to_json())
    model = PeftModel.from_pretrained(subject.base, saved(tmp_path), config=config)
    assert json.loads(config.to_json()) == before
    assert model.peft_config["default"] is not config
    assert not config.inference_mode


def test_a_module_that_shares_the_end_of_a_saved_name_is_loaded_only_if_the_file_has_it(
    tmp_path: Path,
) -> None:
    folder = saved(tmp_path, modules_to_save=["norm"])
    subject = Subject()
    subject.base.my_norm = torch.nn.LayerNorm(2)
    model = PeftModel.from_pretrained(subject.base, folder)
    assert model.peft_config["default"].modules_to_save == ["norm"]  # type: ignore[attr-defined]


def test_tensors_alone_can_be_read_from_files_as_with_peft(tmp_path: Path) -> None:
    saved(tmp_path)
    for mapping in (None, {"^head": "tail"}):
        ours = multigraft.load_peft_weights(tmp_path, device="cpu", key_mapping=mapping)
        theirs = peft.load_peft_weights(str(tmp_path), device="cpu", key_mapping=mapping)
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert any(key.startswith("base_model.model.tail.") for key in ours)
