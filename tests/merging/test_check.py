"""The comparison of outputs: what it runs, and what it takes for rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from multigraft.errors import MergeError, UnsupportedError
from multigraft.merging.base import open_base
from multigraft.merging.check import compare, inputs_for, outputs
from multigraft.train import load_base
from tests.merging.models import write_llama, write_mixtral

pytest.importorskip("transformers")

PLAIN = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
CHANGE = torch.randn(8, 50, generator=torch.Generator().manual_seed(1))


def verdict(share: float, dtype: torch.dtype = torch.float32, change: float = 1.0):
    """On a merged model that has this share of the adapters' change."""
    adapted = PLAIN + change * CHANGE
    return compare([PLAIN + share * change * CHANGE], [adapted], [PLAIN], dtype)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.1, 2.0, -1.0])
def test_too_little_and_too_much_are_found_out(share: float):
    found = verdict(share)
    assert not found.is_good and found.is_telling
    with pytest.raises(MergeError, match="Nothing was kept"):
        found.require()


def test_all_of_the_change_is_good_and_nan_is_not():
    found = verdict(1.0)
    assert found.is_good and found.agreement == 1.0 and found.places == 8
    adapted = [PLAIN + CHANGE]
    assert not compare([adapted[0] * torch.nan], adapted, [PLAIN], torch.float32).is_good


def test_a_change_below_rounding_is_not_telling():
    assert verdict(0.0, torch.bfloat16, change=0.01).is_good
    assert not verdict(0.0, torch.bfloat16, change=0.01).is_telling
    assert not verdict(0.0, torch.float32, change=0.01).is_good


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_streamed_model_gives_what_it_gives_in_float32(dtype: str, tmp_path: Path):
    base = write_llama(tmp_path / "base", dtype=dtype, tied=True)
    found, inputs = open_base(base), inputs_for(load_base(base))
    (out,) = outputs(found.model, found, inputs)
    with torch.no_grad():
        wanted = load_base(base).float()(**inputs[0]).logits[0]
    torch.testing.assert_close(out, wanted - wanted.mean(-1, keepdim=True), rtol=1e-5, atol=1e-4)
    same = all(
        torch.equal(value, load_base(base).state_dict()[name])
        for name, value in found.model.state_dict().items()
    )
    assert same and not any(module._forward_hooks for module in found.model.modules())


def test_experts_that_are_made_for_a_call_are_gone_after_it(tmp_path: Path):
    base = write_mixtral(tmp_path / "base")
    found, inputs = open_base(base), inputs_for(load_base(base))
    (out,) = outputs(found.model, found, inputs)
    with torch.no_grad():
        wanted = load_base(base)(**inputs[0]).logits[0]
    torch.testing.assert_close(out, wanted - wanted.mean(-1, keepdim=True), rtol=1e-5, atol=1e-4)
    assert not any(found.model.get_parameter(path).any() for path in found.built)


def test_inputs_are_tokens_pixels_or_refused():
    from transformers import LlamaConfig, T5Config, ViTConfig

    class Named(nn.Module):
        def __init__(self, config: object, name: str = "input_ids") -> None:
            super().__init__()
            self.config, self.main_input_name = config, name

    text = Named(LlamaConfig(vocab_size=96, max_position_embeddings=8))
    (row,) = inputs_for(text)
    assert row["input_ids"].shape == (1, 8) and int(row["input_ids"].max()) < 96
    assert torch.equal(inputs_for(text)[0]["input_ids"], row["input_ids"])
    rows = inputs_for(text, [[1, 2], [3]])
    assert [each["input_ids"].tolist() for each in rows] == [[[1, 2]], [[3]]]
    assert "decoder_input_ids" in inputs_for(Named(T5Config(vocab_size=96)))[0]
    (image,) = inputs_for(Named(ViTConfig(image_size=8), "pixel_values"))
    assert image["pixel_values"].shape == (1, 3, 8, 8)
    with pytest.raises(UnsupportedError, match="--check off"):
        inputs_for(Named(ViTConfig(), "input_values"))
