"""Base models and tokenisers: found, or a word about why not."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from multigraft import AdapterNameError, CheckpointError, ConfigError, LoraConfig
from multigraft.train import attach, load_model, load_tokenizer
from multigraft.train.load import pick_device, pick_dtype
from tests.tiny_base import TOKENIZER_FILES

CPU = torch.device("cpu")


@pytest.fixture
def copy(base_dir, tmp_path):
    return shutil.copytree(base_dir, tmp_path / "base")


def test_a_directory_gives_a_frozen_looking_model_in_evaluation_mode(base_dir):
    model = load_model(base_dir)
    assert not model.training
    assert model.dtype == torch.float32
    assert load_tokenizer(base_dir).eos_token == "<|endoftext|>"


def test_a_dtype_is_obeyed(base_dir):
    assert load_model(base_dir, dtype="bfloat16").dtype == torch.bfloat16


def test_a_name_that_is_no_directory_goes_to_the_hub_as_it_is(monkeypatch):
    from transformers import AutoTokenizer

    asked = []
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name, **_: asked.append(name))
    load_tokenizer("organisation/model")
    assert asked == ["organisation/model"]


def test_what_the_hub_refuses_is_told_in_a_line(monkeypatch):
    from transformers import AutoTokenizer

    def refuse(name, **_):
        raise OSError("cannot be reached.\nand more")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(CheckpointError, match=r"o/m: .*no local directory .cannot be") as no:
        load_tokenizer("o/m")
    assert "\n" not in str(no.value)


@pytest.mark.parametrize("name", ["./nope", "a/b/nope", "/nope", "~/nope"])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(name):
    with pytest.raises(CheckpointError, match="no such directory to read a tokeniser from"):
        load_tokenizer(name)


def test_a_folder_without_a_model_is_refused(tmp_path, base_dir):
    for name in TOKENIZER_FILES:
        shutil.copy(base_dir / name, tmp_path / name)
    with pytest.raises(CheckpointError, match="no model could be read from there"):
        load_model(tmp_path)


def test_damaged_weights_are_refused(copy):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="no model could be read from there"):
        load_model(copy)


def test_a_checkpoint_that_lacks_weights_is_refused(copy):
    tensors = load_file(copy / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 of the model's weights \(lm_head.weight"):
        load_model(copy)


def test_an_adapters_folder_is_no_base_and_its_own_base_is_named(base_dir, tmp_path):
    attach(load_model(base_dir), LoraConfig(target_modules=["q_proj"]), "default").save_pretrained(
        tmp_path
    )
    with pytest.raises(CheckpointError, match="holds an adapter, not a base") as raised:
        load_model(tmp_path)
    assert str(base_dir) in str(raised.value)


def test_auto_means_float32_on_the_cpu_and_the_checkpoints_own_elsewhere():
    assert pick_dtype("auto", CPU) == torch.float32
    assert pick_dtype("auto", torch.device("meta")) == "auto"


def test_an_unknown_dtype_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"'float3'.*Nearest: `float32`"):
        pick_dtype("float3", CPU)


@pytest.mark.parametrize("name", ["gpu", "cuda:99"])
def test_a_device_that_is_not_here_is_refused(name):
    with pytest.raises(ConfigError, match=rf"`device` \(='{name}'\)"):
        pick_device(name)


def test_initial_values_follow_from_the_seed_alone(base_dir):
    config = LoraConfig(target_modules=["q_proj"])
    models = [load_model(base_dir) for _ in range(3)]
    A = []
    for model, seed in zip(models, (1, 1, 2), strict=True):
        torch.rand(3)
        peft_model = attach(model, config, "a", seed)
        A.append(peft_model.base_model.layers()[0].lora_A["a"].weight)
    assert torch.equal(A[0], A[1])
    assert not torch.equal(A[0], A[2])


def test_the_second_adapter_goes_beside_the_first(base_dir):
    config = LoraConfig(target_modules=["q_proj"])
    model = attach(attach(load_model(base_dir), config, "a"), config, "b")
    assert [list(layer.grafts) for layer in model.base_model.layers()] == [["a", "b"]] * 2
    with pytest.raises(AdapterNameError, match="`a` exists"):
        attach(model, config, "a")
