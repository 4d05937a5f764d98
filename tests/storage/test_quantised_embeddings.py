"""Embeddings whose rows are packed: bitsandbytes' 4-bit and 8-bit ones."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from bitsandbytes.nn import Embedding4bit, Embedding8bit, EmbeddingFP4, EmbeddingNF4
from torch import Tensor, nn

from multigraft import LoraConfig, MultigraftWarning, PeftModel, get_peft_model
from multigraft.storage import storage_of
from tests.laws import fingerprint

KINDS = {
    "4-bit": (Embedding4bit, 0.16),
    "nf4": (EmbeddingNF4, 0.11),
    "fp4": (EmbeddingFP4, 0.16),
    "8-bit": (Embedding8bit, 0.01),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "merged into quantised", MultigraftWarning)
        yield


def adapted(kind: str) -> PeftModel:
    torch.manual_seed(0)
    base = nn.Sequential(KINDS[kind][0](40, 64).to("cpu"))
    return get_peft_model(base, LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))


def ids() -> Tensor:
    return torch.randint(40, (3, 5), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_read_as_the_lookup_gives_them(kind):
    layer = KINDS[kind][0](40, 64).to("cpu")
    torch.testing.assert_close(layer(ids()), storage_of(layer).read(layer)[ids()])


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_trained_merged_and_unmerged(kind):
    model = adapted(kind)
    model(ids()).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        apart, before = model(ids()), fingerprint(model)
        model.merge_adapter()
        assert float((model(ids()) - apart).norm() / apart.norm()) < KINDS[kind][1]
        model.unmerge_adapter()
        assert fingerprint(model) == before
        assert torch.equal(model(ids()), apart)
