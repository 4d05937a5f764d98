"""transformers' `Trainer` on adapted models, wrapped and in place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from multigraft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from tests.integrations.small_trainer import STEPS, base, config, trainer

FILES = {"adapter_config.json", "adapter_model.safetensors"}
Make = Callable[..., nn.Module]


def wrapped(adapter: str = "default", **more: Any) -> nn.Module:
    return get_peft_model(base(), config(task_type="CAUSAL_LM", **more), adapter)


def in_place(adapter: str = "default", **more: Any) -> nn.Module:
    return inject_adapter_in_model(config(**more), base(), adapter)


MODES = pytest.mark.parametrize("make", [wrapped, in_place])


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of what trains, by name in the base model."""
    root = model.get_base_model() if isinstance(model, PeftModel) else model
    return {n: p.detach().clone() for n, p in root.named_parameters() if p.requires_grad}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@MODES
def test_labels_and_columns_are_the_bases(make: Make, tmp_path: Path):
    subject = trainer(make(), tmp_path)
    subject._set_signature_columns_if_needed()
    assert subject.label_names == ["labels"]
    assert {"input_ids", "labels", "position_ids"} <= set(subject._signature_columns)
    assert "stranger" not in subject._signature_columns
    assert subject.model_accepts_loss_kwargs is True


@MODES
def test_checkpoints_hold_adapters_alone(make: Make, tmp_path: Path):
    subject = trainer(make(), tmp_path, save_total_limit=2)
    subject.train()
    subject.save_model(str(tmp_path / "end"))
    folders = sorted(p for p in tmp_path.iterdir())
    assert [p.name for p in folders] == ["checkpoint-3", "checkpoint-4", "end"]
    for folder in folders:
        models = {p.name for p in folder.iterdir()} & {"model.safetensors", "pytorch_model.bin"}
        assert not models
        assert {p.name for p in folder.iterdir()} >= FILES
        saved = load_file(folder / "adapter_model.safetensors")
        assert {key.split(".")[-2] for key in saved} == {"lora_A", "lora_B"}
        assert all(key.startswith("base_model.model.model.layers.") for key in saved)


@MODES
def test_a_checkpoint_opens_on_a_fresh_base(make: Make, tmp_path: Path):
    subject = trainer(make(), tmp_path)
    subject.train()
    opened = PeftModel.from_pretrained(base(), tmp_path / f"checkpoint-{STEPS}", is_trainable=True)
    assert same(trained(opened), trained(subject.model))


@MODES
def test_resuming_ends_where_an_unbroken_run_ends(make: Make, tmp_path: Path):
    whole = trainer(make(), tmp_path / "whole")
    whole.train()
    first = trainer(make(), tmp_path / "parts")
    first.train()
    again = trainer(make(), tmp_path / "parts")
    again.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert again.state.global_step == STEPS
    assert same(trained(again.model), trained(whole.model))


class Scored(transformers.Trainer):
    """The second checkpoint is the best."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        return {**metrics, "eval_loss": abs(self.state.global_step - 2.0)}


def scored(model: nn.Module, folder: Path, **options: Any) -> transformers.Trainer:
    options = {"load_best_model_at_end": True, **options}
    return trainer(model, folder, kind=Scored, **options)


@MODES
@pytest.mark.parametrize("adapter", ["default", "helper"])
def test_the_best_checkpoint_comes_back(make: Make, adapter: str, tmp_path: Path):
    subject = scored(make(adapter), tmp_path)
    subject.train()
    best = tmp_path / "checkpoint-2"
    assert Path(subject.state.best_model_checkpoint) == best
    saved = load_file(
        (best if adapter == "default" else best / adapter) / "adapter_model.safetensors"
    )
    now = trained(subject.model)
    key = "model.layers.0.mlp.down_proj.lora_B"
    assert torch.equal(now[f"{key}.{adapter}.weight"], saved[f"base_model.model.{key}.weight"])
    last = load_file(next((tmp_path / f"checkpoint-{STEPS}").rglob("adapter_model.safetensors")))
    assert not torch.equal(now[f"{key}.{adapter}.weight"], last[f"base_model.model.{key}.weight"])


@MODES
def test_several_adapters_train_together_and_come_back(make: Make, tmp_path: Path):
    model = make()
    if isinstance(model, PeftModel):
        model.add_adapter("second", config())
        model.base_model.set_adapter(["default", "second"])
    else:
        inject_adapter_in_model(config(), model, "second")
        model.set_adapter(["default", "second"])
    subject = scored(model, tmp_path)
    subject.train()
    now = trained(model)
    assert {name.split(".")[-2] for name in now} == {"default", "second"}
    key = "model.layers.1.self_attn.q_proj.lora_A"
    for adapter, folder in (("default", ""), ("second", "second")):
        saved = load_file(tmp_path / "checkpoint-2" / folder / "adapter_model.safetensors")
        assert torch.equal(now[f"{key}.{adapter}.weight"], saved[f"base_model.model.{key}.weight"])


@MODES
def test_an_adapter_that_the_checkpoint_lacks_stays_and_is_named(make: Make, tmp_path: Path):
    trainer(make(), tmp_path).train()
    model = make()
    inject_adapter_in_model(config(), model, "later")
    (model.base_model if isinstance(model, PeftModel) else model).set_adapter("default")
    subject = trainer(model, tmp_path)
    with pytest.warns(UserWarning, match=r"holds nothing for adapters \['later'\]"):
        subject.train(resume_from_checkpoint=True)


@MODES
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_trains_the_same(make: Make, reentrant: bool, tmp_path: Path):
    plain = trainer(make(), tmp_path / "plain", save_strategy="no")
    plain.train()
    options = {"use_reentrant": reentrant}
    subject = trainer(make(), tmp_path / "again", save_strategy="no", **checkpointing(options))
    subject.train()
    for name, value in trained(plain.model).items():
        torch.testing.assert_close(trained(subject.model)[name], value)
        assert value.any()


def checkpointing(options: dict[str, Any]) -> dict[str, Any]:
    """The trainer's options for it, as this version of transformers calls them."""
    known = transformers.TrainingArguments.__dataclass_fields__
    name = "activation" if "activation_checkpointing" in known else "gradient"
    return {f"{name}_checkpointing": True, f"{name}_checkpointing_kwargs": options}


@MODES
def test_label_smoothing_and_noise_find_the_base(make: Make, tmp_path: Path):
    options = {"label_smoothing_factor": 0.1, "neftune_noise_alpha": 1.0}
    subject = trainer(make(), tmp_path, save_strategy="no", **options)
    subject.train()
    assert any(value.any() for name, value in trained(subject.model).items() if "lora_B" in name)


def test_a_prefix_is_saved_and_comes_back(tmp_path: Path):
    wanted = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = get_peft_model(base(), wanted)
    subject = scored(model, tmp_path)
    subject.train()
    saved = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    value = next(p for p in model.parameters() if p.requires_grad)
    assert torch.equal(value, saved["prompt_embeddings"])


def test_what_trains_stays_what_it_is_when_the_best_comes_back(tmp_path: Path):
    model = wrapped()
    before = [p for p in model.parameters() if p.requires_grad]
    scored(model, tmp_path).train()
    assert [id(p) for p in model.parameters() if p.requires_grad] == [id(p) for p in before]
    assert model.peft_config["default"].inference_mode is False


def test_models_that_are_not_ours_are_the_trainers_own(tmp_path: Path):
    wrapped()  # which registers
    subject = scored(base(), tmp_path)
    subject.train()
    assert (tmp_path / "checkpoint-2" / "model.safetensors").exists()
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert torch.equal(subject.model.model.norm.weight, saved["model.norm.weight"])


@MODES
def test_a_quantised_base_passes_the_trainers_check(make: Make):
    from transformers.trainer_utils import validate_quantization_for_training

    class Quantizer:
        is_trainable = True
        is_qat_trainable = False

    plain = base()
    plain.is_quantized, plain.hf_quantizer = True, Quantizer()
    with pytest.raises(ValueError, match="purely quantized"):
        validate_quantization_for_training(plain)
    lora = LoraConfig(target_modules=["q_proj"])
    validate_quantization_for_training(
        get_peft_model(plain, lora) if make is wrapped else inject_adapter_in_model(lora, plain)
    )
