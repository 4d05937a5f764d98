"""Adapters that were trained with tokens of their own, merged into a base that lacks them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import multigraft as mg
from multigraft.merging import merge_files
from multigraft.train import load_base
from tests.merging.models import require_same, write_llama

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::multigraft.MultigraftWarning")

LINEAR = mg.LoraConfig(target_modules=["q_proj"], r=4)
BOTH = mg.LoraConfig(target_modules=["q_proj"], r=4, modules_to_save=["embed_tokens", "lm_head"])
ONE = mg.LoraConfig(target_modules=["q_proj"], r=4, modules_to_save=["embed_tokens"])


def resized(base: Path, rows: int = 104) -> nn.Module:
    model = load_base(base)
    model.resize_token_embeddings(rows, mean_resizing=False)  # type: ignore[operator]
    with torch.no_grad():
        for module in {model.get_input_embeddings(), model.get_output_embeddings()}:  # type: ignore[operator]
            module.weight[96:] = module.weight[:96].mean(0)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("config", [BOTH, ONE, LINEAR], ids=["both", "one", "linear"])
def test_the_merged_model_has_the_larger_vocabulary(config, tied: bool, tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base", tied=tied, shard="6KB")
    model = mg.get_peft_model(resized(base), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.roster.parameters("default"):
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "a", save_embedding_layers=config is LINEAR)
    done = merge_files([tmp_path / "a"], tmp_path / "out", base=base)
    wanted = mg.PeftModel.from_pretrained(resized(base), tmp_path / "a").eval().merge_and_unload()
    require_same(tmp_path / "out", wanted)
    found = load_base(tmp_path / "out")
    assert found.config.vocab_size == 104 and found.get_input_embeddings().weight.shape[0] == 104
    assert done.verdict is not None and done.verdict.is_good
    assert done.untied == (["lm_head.weight"] if tied and config is not LINEAR else [])
