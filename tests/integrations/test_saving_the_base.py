"""What `get_base_model().save_pretrained()` writes: the base, as it is, under its own names."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from multigraft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from tests.integrations.small_trainer import base, config

IDS = torch.tensor([[3, 4, 5]])


def moved(model: Any) -> Any:
    """With an adapter that changes outputs."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return model


def tied() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


@pytest.mark.parametrize("make", [base, tied])
def test_the_base_comes_back_from_what_it_saved(make: Any, tmp_path: Path) -> None:
    plain = make().eval()
    plain.save_pretrained(tmp_path / "before")
    targets = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = moved(get_peft_model(copy.deepcopy(plain), targets)).eval()
    model.get_base_model().save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / p / "model.safetensors") for p in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    names = {p.name for p in (tmp_path / "after").iterdir()}
    assert names == {p.name for p in (tmp_path / "before").iterdir()}
    again = type(plain).from_pretrained(tmp_path / "after").eval()
    assert torch.equal(again(IDS).logits, plain(IDS).logits)
    assert not torch.equal(model(IDS).logits, plain(IDS).logits)


def test_what_is_merged_is_saved_with_it(tmp_path: Path) -> None:
    model = moved(get_peft_model(base(), config())).eval()
    expected = model(IDS).logits
    model.base_model.merge_adapter()
    model.get_base_model().save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_handle_and_its_tuner_know_the_difference(tmp_path: Path) -> None:
    model = get_peft_model(base(), config())
    model.save_pretrained(tmp_path / "adapter")
    model.base_model.save_pretrained(tmp_path / "base")
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert not (tmp_path / "base" / "adapter_config.json").exists()
    loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    loaded.get_base_model().save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").is_file()


def test_a_model_adapted_in_place_saves_its_adapters_whoever_holds_it(tmp_path: Path) -> None:
    plain = inject_adapter_in_model(config(), base())
    handle = PeftModel(plain, None)
    handle.get_base_model().save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").is_file()
    assert not (tmp_path / "model.safetensors").exists()


def test_saving_the_base_leaves_everything_as_it_was(tmp_path: Path) -> None:
    model = get_peft_model(base(), config())
    seen = dict(model.get_base_model().__dict__)
    model.get_base_model().save_pretrained(tmp_path)
    with pytest.raises(TypeError):
        model.get_base_model().save_pretrained(tmp_path, "too", "many", "of", "them", *"abcdefgh")
    assert model.get_base_model().__dict__.keys() == seen.keys()
    plain = model.unload()
    assert not {"save_pretrained", "_hf_peft_config_loaded"} & plain.__dict__.keys()
    again = inject_adapter_in_model(config(), plain)
    again.save_pretrained(tmp_path / "adapters")
    assert (tmp_path / "adapters" / "adapter_config.json").is_file()
