"""Batches and their order."""

from __future__ import annotations

import torch

from multigraft.train import Encoded, Order, collate
from multigraft.train.encode import IGNORED


def test_rows_are_padded_at_the_end_and_masked():
    batch = collate([Encoded([5, 6, 7], [False, True, True]), Encoded([8], [True])], pad=3)
    assert batch.ids.tolist() == [[5, 6, 7], [8, 3, 3]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert batch.tokens == 4


def test_every_pass_holds_every_example_once():
    order = Order(7, seed=0)
    passes = [order.slice(7 * n, 7) for n in range(3)]
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert passes[0] != passes[1]


def test_the_order_follows_from_the_seed_alone():
    torch.manual_seed(1)
    first = Order(50, seed=4).slice(0, 120)
    torch.manual_seed(2)
    assert Order(50, seed=4).slice(0, 120) == first
    assert Order(50, seed=5).slice(0, 120) != first


def test_a_run_can_be_taken_up_at_any_place():
    order = Order(10, seed=0)
    whole = order.slice(0, 45)
    assert Order(10, seed=0).slice(23, 22) == whole[23:]
    assert [order[n] for n in (44, 3, 17)] == [whole[n] for n in (44, 3, 17)]
