"""Files against a base model of which the config alone is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from multigraft import LoraConfig, doctor, get_peft_model
from tests.diagnosis.files import PREFIX, UP_A, Tensors, only, rewrite, tensors
from tests.weaknesses import nets


def test_a_base_on_the_meta_device_will_do(folder: Path) -> None:
    with torch.device("meta"):
        base = nets.Net()
    assert doctor(folder, base).is_healthy


def test_missing_extra_and_misshapen_tensors_are_found_against_a_base(folder: Path) -> None:
    def change(held: Tensors) -> None:
        del held[f"{PREFIX}head.bias"]
        held[f"{PREFIX}blocks.7.up.lora_A.weight"] = torch.ones(2, 8)
        held[f"{PREFIX}blocks.7.up.lora_B.weight"] = torch.ones(12, 2)
        held[UP_A] = torch.ones(2, 9)

    rewrite(folder, change)
    assert doctor(folder).is_healthy
    found = {each.path: each.problem for each in doctor(folder, nets.net()).findings}
    assert found == {
        f"{PREFIX}head.bias": "is meant by the config and missing from the file.",
        f"{PREFIX}blocks.7.up.lora_A.weight": "is in the file, and no part of this adapter on Net.",
        f"{PREFIX}blocks.7.up.lora_B.weight": "is in the file, and no part of this adapter on Net.",
        UP_A: "has the shape (2, 9), and the base needs (2, 8).",
    }


def test_a_config_that_means_nothing_on_the_base_is_found(folder: Path) -> None:
    finding = only(doctor(folder, torch.nn.Linear(2, 2)), "base model")
    assert "means nothing on Linear" in finding.problem


def test_an_extended_vocabulary_is_found_with_the_remedy(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    small = transformers.LlamaConfig(vocab_size=16, **sizes, **heads)
    large = transformers.LlamaConfig(vocab_size=18, **sizes, **heads)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(transformers.LlamaForCausalLM(large), config)
    model.save_pretrained(tmp_path)
    finding = only(doctor(tmp_path, transformers.LlamaForCausalLM(small)), "base model")
    assert finding.problem == "has the shape (18, 8), and the base needs (16, 8)."
    assert "base.resize_token_embeddings(18)" in finding.remedy


def test_an_embedding_that_an_adapter_brings_along_fits_or_is_found(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(
        vocab_size=16, num_attention_heads=2, num_key_value_heads=2, **sizes
    )
    model = get_peft_model(transformers.LlamaForCausalLM(config), LoraConfig(r=2))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    with torch.device("meta"):
        base = transformers.LlamaForCausalLM(config)
        config.vocab_size = 18
        larger = transformers.LlamaForCausalLM(config)
    assert f"{PREFIX}model.embed_tokens.weight" in tensors(tmp_path)
    assert doctor(tmp_path, base).is_healthy
    found = doctor(tmp_path, larger).findings
    assert {each.path for each in found} == {
        f"{PREFIX}lm_head.weight",
        f"{PREFIX}model.embed_tokens.weight",
    }
    assert "base.resize_token_embeddings(16)" in found[0].remedy
