"""Models whose files hold them in another layout: experts by themselves, older names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import multigraft as mg
from multigraft.errors import UnsupportedError
from multigraft.merging import job, layout, merge_files
from multigraft.merging.base import open_base
from multigraft.train import load_base
from tests.merging.models import merged_in_memory, require_same, write_adapter, write_mixtral

pytest.importorskip("transformers", minversion="5")

FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CONFIGS = {
    "attention": mg.LoraConfig(target_modules=["q_proj", "v_proj"], r=4),
    "experts": mg.LoraConfig(target_modules=["q_proj"], target_parameters=FUSED, r=4),
    "dora": mg.LoraConfig(target_modules=[], target_parameters=FUSED[:1], r=4, use_dora=True),
    "router": mg.LoraConfig(target_modules=["q_proj"], modules_to_save=["gate"], r=4),
    "whole": mg.LoraConfig(target_modules=["q_proj"], modules_to_save=["experts"], r=4),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixtral(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("kind", CONFIGS)
def test_single_experts_are_merged_as_fused_ones(kind: str, base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", base, CONFIGS[kind])
    done = merge_files([adapter], tmp_path / "out", base=base)
    require_same(tmp_path / "out", merged_in_memory(base, adapter))
    assert done.verdict is not None and done.verdict.is_good and done.verdict.is_telling
    files = [load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out")]
    assert files[0].keys() == files[1].keys()  # the layout is the base's
    assert any("experts.3.w2.weight" in key for key in files[1])


def test_what_is_made_of_several_takes_no_memory_until_it_is_used(base: Path) -> None:
    found = open_base(base)
    path = f"model.layers.0.{FUSED[0]}"
    parameter = found.model.get_parameter(path)
    assert parameter.untyped_storage().nbytes() == 4
    assert torch.equal(found.values_of(path), load_base(base).get_parameter(path))
    assert len(found.built[path].keys) == 8


def test_an_adapter_that_began_with_a_part_of_such_a_weight_is_refused(
    base: Path, tmp_path: Path
) -> None:
    """No layer of this model is both; as if `q_proj` were made of two tensors."""
    spec = mg.LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights="pissa")
    handle = mg.get_peft_model(load_base(base), spec)
    found = open_base(base)
    job._refuse_begun(found, handle)
    found.built["model.layers.1.self_attn.q_proj.weight"] = next(iter(found.built.values()))
    with pytest.raises(UnsupportedError, match=r"began with a part of it.*save_original_format"):
        job._refuse_begun(found, handle)


def test_what_cannot_be_taken_apart_again_is_refused(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "_undoing", lambda model: lambda values: values)
    with pytest.raises(UnsupportedError, match="cannot be taken apart"):
        open_base(base)


def test_older_names_are_kept(tmp_path: Path) -> None:
    """LayerNorm's tensors are called gamma and beta in BERT's first files."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=96, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    base = tmp_path / "base"
    BertForMaskedLM(config).save_pretrained(base)
    path = base / "model.safetensors"
    tensors = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): t
        for key, t in load_file(path).items()
    }
    save_file(tensors, path, {"format": "pt"})
    spec = mg.LoraConfig(target_modules=["query"], modules_to_save=["LayerNorm"], r=4)
    adapter = write_adapter(tmp_path / "a", base, spec)
    merge_files([adapter], tmp_path / "out", base=base)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == tensors.keys()
    require_same(tmp_path / "out", merged_in_memory(base, adapter))
