"""Directions of rows that come batch by batch are those of all rows at once."""

from __future__ import annotations

import pytest
import torch

from multigraft.calibration.incremental import Directions


def rows(count: int = 300) -> torch.Tensor:
    """Rows with a mean, and variances that fall by half from one direction to the next."""
    source = torch.Generator().manual_seed(0)
    turn, _ = torch.linalg.qr(torch.randn(12, 12, generator=source))
    spread = 0.5 ** torch.arange(12)
    return torch.randn(count, 12, generator=source) * spread @ turn + 3.0


@pytest.mark.parametrize("drift", [0.0, 1.0])
def test_they_are_those_of_all_rows_at_once(drift: float) -> None:
    """Whether or not the mean moves from batch to batch."""
    X, study = rows(), Directions(4)
    X = X + drift * torch.arange(5.0).repeat_interleave(60)[:, None] * (torch.arange(12) == 3)
    for batch in X.split(60):
        study.update(batch)
    centred = X.double() - X.double().mean(0)
    _, S, Vh = torch.linalg.svd(centred, full_matrices=False)
    cosines = (study.components.double() * Vh[:4]).sum(1).abs()
    assert float(cosines.min()) > 0.999
    torch.testing.assert_close(study.values.double(), S[:4], rtol=2e-2, atol=0)
    torch.testing.assert_close(study.ratios.double(), (S**2 / (S**2).sum())[:4], rtol=3e-2, atol=0)
    torch.testing.assert_close(study.mean, X.double().mean(0), rtol=1e-6, atol=0)


def test_the_largest_entry_of_each_is_positive() -> None:
    study = Directions(3)
    study.update(rows(50))
    largest = study.components.abs().argmax(1)
    assert bool((study.components[torch.arange(3), largest] > 0).all())


def test_cosines_tell_when_they_stand_still() -> None:
    study = Directions(2)
    assert not study.update(rows(50)).any()
    for _ in range(5):
        cosines = study.update(rows(50))
    assert float(cosines.min()) > 0.9999


def test_no_random_number_of_the_users_is_drawn() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Directions(2).update(rows(50))
    assert torch.equal(torch.rand(3), expected)
