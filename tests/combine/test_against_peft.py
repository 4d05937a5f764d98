"""Every rule gives what PEFT's gives: tensors, outputs, configs, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from tests.combine.nets import (
    EXACT,
    IDS,
    RULES,
    SPARSE,
    base,
    combine,
    drawn_from,
    options,
    ours,
    state,
    theirs,
)
from tests.oracle import peft_state, quiet

A, B = options(), options(lora_alpha=10)


def both(rule: str, *adapters: Any, **more: Any) -> tuple[Any, Any]:
    """The combination in both libraries."""
    adapters = adapters or (A, B)
    with drawn_from(5):
        own = combine(ours(*adapters), rule, **more)
    with drawn_from(5):
        other = combine(theirs(*adapters), rule, **more)
    return own, other


def near(own: torch.Tensor, other: torch.Tensor, what: str = "") -> None:
    torch.testing.assert_close(own, other, atol=2e-6, rtol=1e-4, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize("rule", RULES)
def test_outputs_agree(rule: str) -> None:
    own, other = both(rule)
    near(own(IDS), other(IDS))
    assert not torch.allclose(own(IDS), base()(IDS), atol=1e-3), "the combination does nothing"


@pytest.mark.parametrize("rule", [r for r in RULES if r != "svd"])
def test_tensors_agree(rule: str) -> None:
    """All but those of a decomposition whose signs are free."""
    own, other = both(rule)
    expected = peft_state(other, "sum")
    assert state(own).keys() == expected.keys()
    for key, value in state(own).items():
        near(value, expected[key], key)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [-1.0, 0.5], [0.0, 2.0], [-0.3, -0.6]])
@pytest.mark.parametrize("rule", RULES)
def test_weights_of_either_sign_agree(rule: str, weights: list[float]) -> None:
    own, other = both(rule, weights=weights)
    near(own(IDS), other(IDS))


@pytest.mark.parametrize("rule", ["ties", "ties_svd", "dare_ties", "dare_ties_svd"])
def test_signs_elected_by_number_agree(rule: str) -> None:
    three = (A, B, options(lora_alpha=3))
    more: dict[str, Any] = {"weights": [0.7, -0.4, 1.2], "majority_sign_method": "frequency"}
    own, other = both(rule, *three, **more)
    near(own(IDS), other(IDS))
    total = both(rule, *three, **{**more, "majority_sign_method": "total"})[0]
    assert not torch.allclose(own(IDS), total(IDS), atol=1e-4)


@pytest.mark.parametrize("rule", ["svd", *(f"{name}_svd" for name in SPARSE)])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_rank_of_choice_agrees(rule: str, rank: int) -> None:
    own, other = both(rule, svd_rank=rank)
    near(own(IDS), other(IDS))
    assert own.peft_config["sum"].r == rank


@pytest.mark.parametrize("rule", ["ties_svd", "magnitude_prune_svd"])
def test_clamped_decompositions_agree(rule: str) -> None:
    own, other = both(rule, svd_clamp=0.9)
    near(own(IDS), other(IDS))
    free = both(rule)[0]
    assert not torch.allclose(own(IDS), free(IDS), atol=1e-4), "nothing is clamped"


@pytest.mark.parametrize("rule", EXACT)
def test_different_ranks_and_targets_agree(rule: str) -> None:
    """Each layer has what those adapters do that act there; the rank is the largest needed."""
    few = options(target_modules=["lin", "conv"], r=2)
    own, other = both(rule, A, few)
    near(own(IDS), other(IDS))
    assert own.peft_config["sum"].r == other.peft_config["sum"].r


@pytest.mark.parametrize("rule", RULES)
def test_different_targets_are_united(rule: str) -> None:
    own, other = both(
        rule, options(target_modules=["lin", "turned"]), options(target_modules=["lin", "emb"])
    )
    near(own(IDS), other(IDS))
    assert set(own.peft_config["sum"].target_modules) == {"lin", "turned", "emb"}


def test_regular_expressions_are_united_as_in_peft() -> None:
    own, other = both(
        "cat", options(target_modules="lin|turned"), options(target_modules="emb|lin")
    )
    near(own(IDS), other(IDS))
    assert own.peft_config["sum"].target_modules == other.peft_config["sum"].target_modules


@pytest.mark.parametrize("rule", ["linear", "cat", "ties_svd"])
def test_peft_loads_the_file_to_the_same_outputs(rule: str, tmp_path: Path) -> None:
    own, _ = both(rule)
    own.save_pretrained(tmp_path, selected_adapters=["sum"])
    with quiet():
        there = peft.PeftModel.from_pretrained(base(), tmp_path / "sum").eval()
    near(own(IDS), there(IDS))
