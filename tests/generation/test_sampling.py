"""Draws are draws from the distribution that was asked for, row by row."""

from __future__ import annotations

import pytest
import torch

from multigraft.errors import ConfigError
from multigraft.generation import Sampling
from multigraft.generation.sampling import Draws

SCORES = torch.tensor([[2.0, 1.0, 0.0, -1.0, -3.0]])
IDS = torch.zeros(1, 1, dtype=torch.long)


def frequencies(sampling: Sampling, count: int = 4000) -> torch.Tensor:
    draws = Draws(sampling, [7])
    drawn = torch.cat([draws(IDS, SCORES).argmax(-1) for _ in range(count)])
    return torch.bincount(drawn, minlength=5) / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float):
    wanted = (SCORES[0] / temperature).softmax(-1)
    found = frequencies(Sampling(temperature=temperature))
    assert (found - wanted).abs().max() < 0.03


def test_top_p_keeps_the_likeliest_that_have_the_share():
    shares = SCORES[0].softmax(-1)
    found = frequencies(Sampling(temperature=1.0, top_p=float(shares[:2].sum()) + 0.01))
    assert found[3:].sum() == 0 and (found[:3] > 0).all()
    assert (found[:3] - shares[:3] / shares[:3].sum()).abs().max() < 0.03
    assert frequencies(Sampling(temperature=1.0, top_p=1e-6), 50)[0] == 1


def test_top_k_keeps_so_many():
    found = frequencies(Sampling(temperature=1.0, top_k=2))
    assert (found[:2] > 0).all() and found[2:].sum() == 0


def test_no_temperature_takes_the_likeliest():
    assert frequencies(Sampling(), 10)[0] == 1


def test_rows_of_one_key_draw_alike_and_others_differently():
    scores = SCORES.expand(3, -1)
    draws = Draws(Sampling(temperature=1.0), [1, 1, 2])
    steps = torch.stack([draws(IDS, scores).argmax(-1) for _ in range(64)])
    assert torch.equal(steps[:, 0], steps[:, 1])
    assert not torch.equal(steps[:, 0], steps[:, 2])
    alone = Draws(Sampling(temperature=1.0), [2])
    same = torch.cat([alone(IDS, SCORES).argmax(-1) for _ in range(64)])
    assert torch.equal(same, steps[:, 2])


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"temperature": -1.0}, r"`temperature` \(=-1.0\) must be a number from 0"),
        ({"temperature": float("nan")}, "must be a number from 0"),
        ({"top_p": 0.0}, "above 0 and at most 1"),
        ({"top_k": -1}, "at least 0"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"seed": -1}, "whole number from 0"),
    ],
)
def test_values_that_mean_nothing_are_refused(values: dict[str, float], says: str):
    with pytest.raises(ConfigError, match=says):
        Sampling(**values)
