"""The rules' registry: PEFT's names, and a rule of one's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from multigraft.combine.contract import RULES, Options, rules
from multigraft.combine.dare import dropped
from multigraft.combine.linear import weighted_sum
from multigraft.combine.magnitude_prune import largest
from multigraft.combine.ties import elected_mean
from tests.combine.nets import IDS, combine, options, ours
from tests.combine.nets import RULES as NAMES

T = torch.tensor([[3.0, -1.0, 0.0, 2.0], [-4.0, -2.0, 0.0, 1.0]])
W = torch.tensor([[1.0], [0.5]])


def test_the_names_are_those_of_peft() -> None:
    assert set(RULES) == set(NAMES)


def test_a_rule_of_ones_own_is_one_registration() -> None:
    """Two small choices: how to thin out, and how to agree."""

    def sign(tensor: Tensor, density: float) -> Tensor:
        return tensor.sign() * density

    rules("signs", weighted_sum, sign)
    try:
        model = ours(options(), options())
        expected = torch.sign(model.get_base_model().lin.lora_A["a"].weight) * 0.5
        combine(model, "signs", [1.0, 0.0], density=0.5)
        found = model.get_base_model().lin.lora_A["sum"].weight
        torch.testing.assert_close(found, expected * (6 / 4) ** 0.5)
        assert model(IDS).isfinite().all()
        assert "signs_svd" in RULES
    finally:
        RULES.unregister("signs")
        RULES.unregister("signs_svd")


def test_the_largest_elements_stay() -> None:
    assert largest(T, 0.5).tolist() == [[3.0, 0.0, 0.0, 2.0], [-4.0, -2.0, 0.0, 0.0]]


def test_what_is_dropped_at_random_keeps_its_expectation() -> None:
    torch.manual_seed(0)
    thin = dropped(torch.ones(20_000), 0.25)
    assert set(thin.tolist()) == {0.0, 4.0}
    assert abs(float(thin.mean()) - 1) < 0.05


@pytest.mark.parametrize(
    ("majority", "expected"),
    [("total", [-2.0, -1.0, 0.0, 1.25]), ("frequency", [3.0, -1.0, 0.0, 1.25])],
)
def test_the_mean_is_of_those_that_agree(majority: str, expected: list[float]) -> None:
    """By sum the larger -4 wins; by number 3 and -4 are equal, which counts as positive."""
    assert elected_mean(T, W, majority).tolist() == expected


def test_nothing_is_left_out_at_density_one() -> None:
    merged = RULES["magnitude_prune"].merge(list(T), [1.0, 0.5], Options(density=1.0))
    assert merged.tolist() == weighted_sum(T, W, "total").tolist()
