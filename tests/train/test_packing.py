"""Packing: rows are filled, no example sees another, and models that leak are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from multigraft import TrainingError
from multigraft.train import Encoded, collate, load_model
from multigraft.train.batches import GroupedOrder, collate_packed
from multigraft.train.encode import IGNORED
from multigraft.train.packing import check_packing, pack
from multigraft.train.store import Store
from tests.tiny_base import numbers


def three() -> list[Encoded]:
    return [numbers(1, length)[0] for length in (5, 1, 9)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_examples_logits_are_its_own_alone(base_dir, attention):
    model = load_model(base_dir)
    model.set_attn_implementation(attention)
    examples = three()
    with torch.no_grad():
        packed = model(**collate_packed([examples, examples[:1]], 0).inputs, use_cache=False).logits
        alone = [model(**collate([e], 0).inputs).logits[0] for e in examples]
    assert torch.allclose(packed[0], torch.cat(alone), atol=1e-5)
    assert torch.allclose(packed[1, :5], alone[0], atol=1e-5)


def test_nothing_is_learned_of_an_examples_first_token():
    batch = collate_packed([[Encoded([1, 2], [True, True]), Encoded([3, 4], [True, True])]], 0)
    assert batch.labels.tolist() == [[IGNORED, 2, IGNORED, 4]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 0, 1]]


def test_rows_are_filled_and_every_example_is_in_one():
    lengths = [3, 9, 4, 1, 6, 12, 2]
    rows = pack(lengths, 10)
    assert sorted(i for row in rows for i in row) == list(range(7))
    assert all(sum(lengths[i] for i in row) <= 10 or len(row) == 1 for row in rows)
    assert len(rows) == 4


def test_a_model_whose_memory_runs_along_the_row_is_refused(base_dir):
    check_packing(load_model(base_dir), three())

    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(1792, 8)

        def forward(self, input_ids, use_cache, **_):
            from types import SimpleNamespace

            return SimpleNamespace(logits=self.embed(input_ids).cumsum(1))

    with pytest.raises(TrainingError, match="leak into each other"):
        check_packing(Leaky(), three())


def test_grouped_batches_are_of_like_length_and_hold_every_example_once_a_pass():
    lengths = [n % 10 + 1 for n in range(42)]
    order = GroupedOrder(lengths, seed=1, batch_size=4)
    for start in (0, 42, 84):
        assert sorted(order.slice(start, 42)) == list(range(42))
    batches = [order.slice(4 * step, 4) for step in range(31)]
    spread = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches]
    assert sum(s <= 2 for s in spread) >= 26
    assert order.slice(0, 42) != order.slice(42, 42)


def test_a_store_gives_back_what_it_was_given_from_memory_and_from_a_file():
    for limit in (0, 1 << 20):
        store = Store(Encoded, max(limit, 1))
        for example in three():
            store.append(example)
        assert list(store) == store[:] == three()
        assert store[-1] == three()[-1]
        assert store.lengths == [5, 1, 9]
