"""Orthogonal beginnings: neither factor is zero, and their product is."""

from __future__ import annotations

import pytest
import torch

from multigraft import LoraConfig, TargetError, get_peft_model
from tests.initialisations.nets import factors, net, options, ours, theirs


def test_the_product_is_zero_and_neither_factor_is() -> None:
    A, B = factors(ours("orthogonal"), "first")
    assert float((B @ A).abs().max()) < 1e-6
    assert torch.linalg.matrix_rank(A) == torch.linalg.matrix_rank(B) == 2


def test_values_are_distributed_as_pefts() -> None:
    spreads = []
    for make in (ours, theirs):
        drawn = []
        for seed in range(30):
            base = net()
            torch.manual_seed(seed)
            drawn.append(factors(make("orthogonal", base), "second"))
        spreads.append(
            [float(torch.cat([t.flatten() for t in one]).std()) for one in zip(*drawn, strict=True)]
        )
    for mine, other in zip(*spreads, strict=True):
        assert mine == pytest.approx(other, rel=0.1)


def test_an_odd_rank_is_refused_with_the_next_even_one() -> None:
    with pytest.raises(TargetError, match=r"first: the rank \(=3\) must be even .* try 4"):
        get_peft_model(net(), LoraConfig(**options("orthogonal", r=3)))
