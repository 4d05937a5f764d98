"""Converting: golden names, equal tensors there and back, and nothing lost in silence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from multigraft import CheckpointError, StateError, UnsupportedError
from multigraft.exchange import convert
from tests.exchange.adapters import SIZES, settings_in, tensors_in, write
from tests.exchange.test_gguf import base

BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
FLAT = "down_blocks_1_attentions_0_transformer_blocks_0"
LAYER = "text_model.encoder.layers.3"
TEXT = f"{LAYER}.self_attn"
RANKS = {f"{BLOCK}.attn1.to_q": 4, f"{BLOCK}.attn1.to_out.0": 2, f"{BLOCK}.ff.net.0.proj": 4}
KOHYA = {
    f"lora_unet_{FLAT}_attn1_to_q": f"unet {BLOCK}.attn1.to_q",
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": f"unet {BLOCK}.attn2.to_k",
    f"lora_unet_{FLAT}_attn1_to_out_0": f"unet {BLOCK}.attn1.to_out.0",
    "lora_te1_text_model_encoder_layers_3_self_attn_q_proj": f"text_encoder {TEXT}.q_proj",
    "lora_te2_text_model_encoder_layers_3_mlp_fc1": f"text_encoder_2 {LAYER}.mlp.fc1",
}
"""Names in a golden file of kohya's to the model and the layer."""


def pair(rank: int = 4, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, 6, generator=generator), torch.randn(5, rank, generator=generator)


def golden_kohya(path: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for number, flat in enumerate(KOHYA):
        rank = 2 if flat.endswith("to_out_0") else 4
        A, B = pair(rank, number)
        tensors |= {f"{flat}.lora_down.weight": A, f"{flat}.lora_up.weight": B}
        tensors[f"{flat}.alpha"] = torch.tensor(1.0 + number)
    save_file(tensors, path, {"ss_network_dim": "4"})
    return tensors


def unet_adapter(folder: Path, **config) -> Path:
    tensors = {}
    for number, (path, rank) in enumerate(RANKS.items()):
        A, B = pair(rank, number)
        tensors[f"base_model.model.{path}.lora_A.weight"] = A
        tensors[f"base_model.model.{path}.lora_B.weight"] = B
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "rank_pattern": {r"to_out\.0": 2}}
    values |= {"target_modules": sorted(RANKS)} | config
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


def assert_equal(first, second) -> None:
    assert first.keys() == second.keys()
    assert all(
        torch.equal(first[k], second[k]) and first[k].dtype == second[k].dtype for k in first
    )


def scales(folder: Path) -> dict[str, float]:
    """Alpha / rank by path, as PEFT reads the config."""
    from multigraft import PeftConfig
    from multigraft.config import pattern_value

    config = PeftConfig.from_pretrained(folder)
    found = {}
    for key in tensors_in(folder):
        path = key.removeprefix("base_model.model.").partition(".lora_")[0]
        rank = pattern_value(config.rank_pattern, path, config.r)
        assert rank == tensors_in(folder)[f"base_model.model.{path}.lora_A.weight"].shape[0]
        found[path] = pattern_value(config.alpha_pattern, path, config.lora_alpha) / rank
    return found


def test_a_golden_kohya_file_becomes_a_folder_a_model(tmp_path):
    tensors = golden_kohya(tmp_path / "k.safetensors")
    convert(tmp_path / "k.safetensors", "peft", tmp_path / "p")
    for number, (flat, meaning) in enumerate(KOHYA.items()):
        part, path = meaning.split()
        held = tensors_in(tmp_path / "p" / part)
        begin = f"base_model.model.{path}.lora_"
        assert torch.equal(held[f"{begin}A.weight"], tensors[f"{flat}.lora_down.weight"])
        assert torch.equal(held[f"{begin}B.weight"], tensors[f"{flat}.lora_up.weight"])
        rank = 2 if flat.endswith("to_out_0") else 4
        assert scales(tmp_path / "p" / part)[path] == (1 + number) / rank


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
@pytest.mark.parametrize(
    "config", [{}, {"alpha_pattern": {"ff.net.0.proj": 3}}, {"use_rslora": True}]
)
def test_there_and_back_tensors_and_scales_are_equal(form, config, tmp_path):
    folder = unet_adapter(tmp_path / "a", **config)
    convert(folder, form, tmp_path / "f.safetensors")
    convert(tmp_path / "f.safetensors", "peft", tmp_path / "b")
    assert_equal(tensors_in(folder), tensors_in(tmp_path / "b"))
    alphas = {r"ff.net.0.proj": 3} if "alpha_pattern" in config else {}
    for path, scale in scales(tmp_path / "b").items():
        rank = RANKS[path]
        alpha = next((v for k, v in alphas.items() if path.endswith(k)), 6)
        assert scale == pytest.approx(
            alpha / (rank**0.5 if "use_rslora" in config else rank), rel=1e-7
        )


def test_kohyas_names_are_golden(tmp_path):
    convert(unet_adapter(tmp_path / "a"), "kohya", tmp_path / "k.safetensors")
    held = load_file(tmp_path / "k.safetensors")
    flats = [f"lora_unet_{FLAT}_{end}" for end in ("attn1_to_q", "attn1_to_out_0", "ff_net_0_proj")]
    leaves = ("lora_down.weight", "lora_up.weight", "alpha")
    assert sorted(held) == sorted(f"{flat}.{leaf}" for flat in flats for leaf in leaves)
    assert held[f"{flats[0]}.alpha"].item() == 6


def test_diffusers_names_and_metadata_are_golden(tmp_path):
    convert(unet_adapter(tmp_path / "a"), "diffusers", tmp_path / "d.safetensors")
    with safe_open(tmp_path / "d.safetensors", "pt") as file:
        said = json.loads(file.metadata()["lora_adapter_metadata"])
        names = set(file.keys())
    assert names == {f"unet.{path}.lora_{x}.weight" for path in RANKS for x in "AB"}
    assert said["unet.r"] == 4 and said["unet.lora_alpha"] == 6
    assert list(said["unet.rank_pattern"].values()) == [2]


OLD = {
    f"unet.{BLOCK}.attn1.processor.to_q_lora.down.weight": "A",
    f"unet.{BLOCK}.attn1.processor.to_q_lora.up.weight": "B",
    f"unet.{BLOCK}.attn1.processor.to_out_lora.down.weight": "A",
    f"unet.{BLOCK}.attn1.processor.to_out_lora.up.weight": "B",
    f"text_encoder.{TEXT}.q_proj.lora_linear_layer.down.weight": "A",
    f"text_encoder.{TEXT}.q_proj.lora_linear_layer.up.weight": "B",
}


def test_names_of_diffusers_before_peft_are_read_with_a_scale_of_1(tmp_path):
    A, B = pair()
    save_file(
        {n: (A if x == "A" else B).clone() for n, x in OLD.items()}, tmp_path / "o.safetensors"
    )
    convert(tmp_path / "o.safetensors", "peft", tmp_path / "p")
    assert scales(tmp_path / "p" / "unet") == {
        f"{BLOCK}.attn1.to_q": 1,
        f"{BLOCK}.attn1.to_out.0": 1,
    }
    assert scales(tmp_path / "p" / "text_encoder") == {f"{TEXT}.q_proj": 1}


def test_magnitudes_of_dora_go_there_and_back(tmp_path):
    A, B = pair()
    flat = f"lora_unet_{FLAT}_attn1_to_q"
    tensors = {f"{flat}.lora_down.weight": A, f"{flat}.lora_up.weight": B}
    tensors[f"{flat}.dora_scale"] = torch.rand(5, 1) + 1
    save_file(tensors, tmp_path / "k.safetensors")
    convert(tmp_path / "k.safetensors", "peft", tmp_path / "p")
    assert settings_in(tmp_path / "p")["use_dora"] is True
    convert(tmp_path / "p", "kohya", tmp_path / "l.safetensors")
    back = load_file(tmp_path / "l.safetensors")
    assert back.pop(f"{flat}.alpha").item() == 4
    assert_equal(back, tensors)


@pytest.mark.parametrize(
    "stray", ["hada_w1_a", "lora_mid.weight", "diff"], ids=["LoHa", "LoCon", "full"]
)
def test_what_is_no_pair_is_refused_and_nothing_is_written(stray, tmp_path):
    tensors = golden_kohya(tmp_path / "k.safetensors")
    tensors[f"lora_unet_{FLAT}_attn1_to_q.{stray}"] = torch.ones(2)
    save_file(tensors, tmp_path / "k.safetensors")
    with pytest.raises(UnsupportedError, match="no low-rank pair"):
        convert(tmp_path / "k.safetensors", "peft", tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_a_flat_name_that_no_words_make_is_refused(tmp_path):
    A, B = pair()
    flat = "lora_unet_double_blocks_0_img_attn_qkv"
    save_file(
        {f"{flat}.lora_down.weight": A, f"{flat}.lora_up.weight": B}, tmp_path / "k.safetensors"
    )
    with pytest.raises(UnsupportedError, match="no way that is known"):
        convert(tmp_path / "k.safetensors", "peft", tmp_path / "p")


def test_gguf_there_and_back_has_equal_tensors(tmp_path):
    pytest.importorskip("gguf")
    config = tmp_path / "base"
    folder = write(tmp_path / "a", base_model_name_or_path=str(base(config)))
    convert(folder, "gguf", tmp_path / "g.gguf")
    convert(tmp_path / "g.gguf", "peft", tmp_path / "b")
    assert_equal(tensors_in(folder), tensors_in(tmp_path / "b"))
    assert set(scales(tmp_path / "b").items()) == {(path, 2.0) for path in SIZES}


def test_a_damaged_gguf_file_is_refused(tmp_path):
    pytest.importorskip("gguf")
    folder = write(tmp_path / "a", base_model_name_or_path=str(base(tmp_path / "base")))
    convert(folder, "gguf", tmp_path / "g.gguf")
    data = (tmp_path / "g.gguf").read_bytes()
    for broken in (data[:40], data[:10], data[:8] + b"\xff" * 16 + data[24:], data[:200]):
        (tmp_path / "x.gguf").write_bytes(broken)
        with pytest.raises(CheckpointError, match="damaged"):
            convert(tmp_path / "x.gguf", "peft", tmp_path / "p")


def test_a_file_of_no_known_format_is_refused(tmp_path):
    save_file({"a.b": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(UnsupportedError, match="none of"):
        convert(tmp_path / "x.safetensors", "peft", tmp_path / "p")


def test_converting_a_file_onto_itself_is_refused(tmp_path):
    golden_kohya(tmp_path / "k.safetensors")
    with pytest.raises(StateError, match="Name another place"):
        convert(tmp_path / "k.safetensors", "kohya", tmp_path / "k.safetensors")
