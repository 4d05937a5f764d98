"""Names of tensors: those of other layouts are mended, those of other tools recognised."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from multigraft import LoraConfig, doctor
from tests.diagnosis.files import (
    PREFIX,
    SETTINGS,
    UP_A,
    WEIGHTS,
    into_memory,
    only,
    output,
    rename,
    resettle,
    rewrite,
    tensors,
    the,
    write,
)
from tests.weaknesses import nets

RENAMES: dict[str, Callable[[str], str]] = {
    "as in memory": into_memory,
    "without prefix": lambda key: key.removeprefix(PREFIX),
    "with the prefix twice": lambda key: f"{PREFIX}{key}",
    "data-parallel": lambda key: f"module.{key}",
    "compiled": lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "sharded": lambda key: key.replace(".up", "._fsdp_wrapped_module.up"),
    "without modules": lambda key: key.removesuffix(".weight") if ".up.lora" in key else key,
    "trained copies": lambda key: key.replace("head.", "head.modules_to_save.default."),
}


@pytest.mark.parametrize("which", RENAMES)
def test_names_of_other_layouts_are_found_and_mended(which: str, folder: Path) -> None:
    wanted, before = output(folder), tensors(folder)
    rename(folder, RENAMES[which])
    finding = only(doctor(folder, nets.net()), "names of tensors")
    assert finding.is_fixable
    found = doctor(folder, nets.net(), fix=True)
    assert found.is_healthy, str(found)
    assert tensors(folder).keys() == before.keys()
    assert torch.equal(output(folder), wanted)


def test_dora_of_older_peft_is_mended(tmp_path: Path) -> None:
    folder = write(tmp_path, LoraConfig(r=2, use_dora=True, target_modules=["up"]))
    wanted = output(folder)
    rename(folder, lambda key: key + ".weight" if key.endswith("magnitude_vector") else key)
    assert doctor(folder, fix=True).is_healthy
    assert torch.equal(output(folder), wanted)


def test_a_resized_embedding_is_a_note_and_not_thrown_away(folder: Path) -> None:
    resettle(folder, target_modules=["up", "conv"])
    extra = {f"{PREFIX}embed.weight": torch.ones(20, 8)}
    rewrite(folder, lambda held: {k: t for k, t in held.items() if "embed" not in k} | extra)
    found = doctor(folder, fix=True)
    assert found.is_healthy
    assert "vocabulary that was resized" in the(found, "tensors of the base").problem
    assert not found.done


def test_a_module_that_the_config_does_not_save_is_found_and_left(folder: Path) -> None:
    resettle(folder, modules_to_save=None)
    found = doctor(folder, fix=True)
    assert "trained or resized" in only(found, "tensors of the base").remedy
    assert not found.done


def test_two_tensors_of_one_meaning_are_found_and_left(folder: Path) -> None:
    rewrite(folder, lambda held: held | {into_memory(UP_A): held[UP_A].clone()})
    finding = only(doctor(folder, fix=True), "names of tensors")
    assert finding.path == UP_A
    assert not finding.is_fixable


FOREIGN = {
    "lora_unet_down_blocks_0_attentions_0_to_q.lora_down.weight": "kohya",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": "kohya",
    "lycoris_unet_mid_block.hada_w1_a": "kohya",
    "unet.down_blocks.0.attn1.to_q.lora_A.weight": "diffusers, for several models",
    "text_encoder.layers.0.q_proj.lora.down.weight": "diffusers, for several models",
    "down_blocks.0.attn1.processor.to_q_lora.down.weight": "diffusers before PEFT",
    "encoder.layer.0.attention.self.query.loras.task.lora_A": "AdapterHub",
    "model.layers.0.self_attn.q_proj.lora_a": "MLX",
    "layers.0.attn.q_proj.lora_a.weight": "torchtune",
    "model.decoder.0.adapter_layer.lora_kqv_adapter.linear_in.weight": "NeMo",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_names_of_other_tools_are_recognised_with_the_remedy(name: str, tmp_path: Path) -> None:
    save_file({name: torch.ones(2, 2)}, tmp_path / "lora.safetensors")
    found = doctor(tmp_path / "lora.safetensors", fix=True)
    finding = the(found, "another tool")
    assert FOREIGN[name] in finding.problem
    assert finding.remedy
    assert not found.done


def test_very_many_tensors_and_names_are_examined_in_time(tmp_path: Path) -> None:
    sites = [f"layers.{number}." + "a_" * 100 for number in range(3000)]
    held = {f"{PREFIX}{site}.lora_{x}.weight": torch.ones(1, 1) for site in sites for x in "AB"}
    patterns = {f"layers.{number}": 2 for number in range(3000)}
    save_file(held | {"lora_prior" + "_" * 500: torch.ones(1)}, tmp_path / WEIGHTS)
    names = [f"name_{number}" for number in range(20_000)]
    values = {"peft_type": "LORA", "target_modules": names, "rank_pattern": patterns}
    (tmp_path / SETTINGS).write_text(json.dumps(values))
    start = time.perf_counter()
    found = doctor(tmp_path)
    assert time.perf_counter() - start < 10
    assert {each.law for each in found.findings} >= {"targets", "ranks"}
