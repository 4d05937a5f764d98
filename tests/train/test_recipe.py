"""The recipe: what it refuses, how many steps it means, and its learning rate."""

from __future__ import annotations

import pytest

from multigraft import ConfigError
from multigraft.train import Recipe


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("epochs", float("inf")),
        ("steps", 0),
        ("steps", 1.5),
        ("batch_size", 0),
        ("batch_size", True),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("warmup", -0.1),
        ("weight_decay", -1.0),
        ("clip", float("inf")),
        ("seed", -1),
        ("seed", 2**43),
    ],
)
def test_a_value_outside_its_field_is_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=rf"`{field}` \(={value!r}\) must be"):
        Recipe(**{field: value})


def test_an_unknown_schedule_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"'cosin'.*Nearest: `cosine`"):
        Recipe(schedule="cosin")


@pytest.mark.parametrize(
    ("recipe", "examples", "steps"),
    [
        (Recipe(epochs=3, batch_size=8), 200, 75),
        (Recipe(epochs=1, batch_size=8), 9, 2),
        (Recipe(epochs=0.01, batch_size=8), 9, 1),
        (Recipe(epochs=3, steps=5), 200, 5),
    ],
)
def test_epochs_are_steps_rounded_up_and_steps_win(recipe, examples, steps):
    assert recipe.total_steps(examples) == steps


@pytest.mark.parametrize("warmup", [0.1, 10])
def test_the_rate_rises_over_the_warm_up_as_a_share_or_a_number(warmup):
    recipe = Recipe(lr=1.0, warmup=warmup, schedule="constant")
    rates = [recipe.lr_at(step, 100) for step in range(12)]
    assert rates[:10] == pytest.approx([(n + 1) / 11 for n in range(10)])
    assert rates[10:] == [1.0, 1.0]


@pytest.mark.parametrize(("schedule", "half"), [("linear", 0.5), ("cosine", 0.5)])
def test_the_rate_falls_to_zero(schedule, half):
    recipe = Recipe(lr=1.0, warmup=0, schedule=schedule)
    rates = [recipe.lr_at(step, 100) for step in range(101)]
    assert rates[0] == 1.0
    assert rates[50] == pytest.approx(half)
    assert rates[100] == pytest.approx(0.0)
    assert rates == sorted(rates, reverse=True)
