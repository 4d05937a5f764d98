"""Adapters in slots are combined, cut and converted as what they are, not as what holds them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from multigraft import convert_to_lora, extract_lora
from multigraft.combine.intruders import reduce_intruder_dimension
from multigraft.hotswap import prepare_model_for_compiled_hotswap
from tests.combine.nets import base, combine, deltas, options, ours
from tests.oracle import quiet

CONFIG = options(target_modules=["lin", "turned", "conv"])


def slotted(*adapters: dict[str, Any]) -> tuple[Any, Any]:
    """The same adapters, plain and in slots of a larger rank."""
    plain, held = ours(*(adapters or (CONFIG,))), ours(*(adapters or (CONFIG,)))
    with quiet():
        prepare_model_for_compiled_hotswap(held, target_rank=7)
    return plain, held


def assert_same(first: Any, second: Any, name: str) -> None:
    a, b = deltas(first, name), deltas(second, name)
    assert a.keys() == b.keys() and a
    for path in a:
        torch.testing.assert_close(a[path], b[path], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("rule", ["cat", "svd", "linear", "ties_svd"])
def test_they_are_combined(rule: str) -> None:
    plain, held = (combine(model, rule) for model in slotted(CONFIG, CONFIG))
    assert_same(plain, held, "sum")
    assert held.peft_config["sum"].r == plain.peft_config["sum"].r


@pytest.mark.parametrize("rank", [2, 0.8])
def test_they_are_cut(rank: float) -> None:
    plain, held = slotted()
    reports = [model.compress_adapter("a", "small", rank) for model in (plain, held)]
    assert [r.rank for r in reports[0]] == [r.rank for r in reports[1]]
    assert_same(plain, held, "small")


def test_they_are_converted() -> None:
    plain, held = slotted()
    with quiet():
        (_, own), (_, other) = (convert_to_lora(model, 3, "a") for model in (plain, held))
    for key, value in own.items():
        if "lora_A" in key and value.dim() == 2:
            pairs = [s[key.replace("lora_A", "lora_B")] @ s[key] for s in (own, other)]
            torch.testing.assert_close(*pairs, atol=1e-6, rtol=1e-4)


def test_their_intruders_are_reduced() -> None:
    plain, held = slotted()
    for model in (plain, held):
        reduce_intruder_dimension(model, "a", "less", threshold_epsilon=0.9, logging_sink=None)
    assert_same(plain, held, "less")


def test_a_base_with_slots_is_a_base() -> None:
    _, held = slotted()
    tuned = base()
    with torch.no_grad():
        tuned.lin.weight.add_(torch.eye(12, 10))
    found = extract_lora(held, tuned, 2)
    assert found.residuals == extract_lora(base(), tuned, 2).residuals
