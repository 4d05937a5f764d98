"""What adapters with tokens of their own ask of the base."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from multigraft import MultigraftWarning
from multigraft.inspection import AdapterFiles
from multigraft.train import load_base
from multigraft.vocabulary import embeddings_of, fit_vocabulary, rows_needed, rows_of
from tests.merging.models import write_gpt2, write_llama

pytest.importorskip("transformers")


def files(name: str, **tensors: torch.Tensor) -> AdapterFiles:
    """Files of these tensors, whose keys have dots for the double underlines."""
    keyed = {key.replace("__", "."): tensor for key, tensor in tensors.items()}
    return AdapterFiles(name, Path(name), {}, keyed, 0)


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return load_base(write_llama(tmp_path / "base"))


def test_embeddings_are_found_by_what_the_model_says(model: Any, tmp_path: Path):
    assert list(embeddings_of(model)) == ["model.embed_tokens", "lm_head"]
    assert list(embeddings_of(load_base(write_gpt2(tmp_path / "g")))) == [
        "transformer.wte",
        "lm_head",
    ]
    assert embeddings_of(torch.nn.Linear(2, 2)) == {} and rows_of(torch.nn.Linear(2, 2)) is None


@pytest.mark.parametrize(
    ("tensors", "rows"),
    [
        ({"model__embed_tokens__weight": torch.zeros(100, 16)}, 100),
        ({"lm_head__base_layer__weight": torch.zeros(101, 16)}, 101),
        ({"model__embed_tokens__lora_embedding_A": torch.zeros(4, 102)}, 102),
        ({"lm_head__lora_A__weight": torch.zeros(4, 16)}, None),
    ],
)
def test_their_rows_are_told_by_the_files(model: Any, tensors: dict[str, Any], rows: int | None):
    assert rows_needed(model, files("a", **tensors)) == rows


def test_room_is_made_for_the_largest_and_old_rows_stay(model: Any):
    before = {path: m.weight.clone() for path, m in embeddings_of(model).items()}
    several = [
        files("small", model__embed_tokens__weight=torch.zeros(99, 16)),
        files("large", lm_head__weight=torch.zeros(104, 16)),
    ]
    with pytest.warns(MultigraftWarning, match=r"`large` has a vocabulary of 104.*from 96"):
        assert fit_vocabulary(model, several) == 104
    for path, module in embeddings_of(model).items():
        weight: Any = module.weight
        assert torch.equal(weight[:96], before[path])
        torch.testing.assert_close(weight[96:], before[path].mean(0).expand(8, -1))
    assert model.config.vocab_size == 104


def test_nothing_happens_where_there_is_room(model: Any):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit_vocabulary(model, []) is None
        same = files("a", model__embed_tokens__weight=torch.zeros(96, 16))
        fewer = files("b", model__embed_tokens__weight=torch.zeros(90, 16))
        assert fit_vocabulary(model, [same, fewer]) is None
