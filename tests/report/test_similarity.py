"""Overlap and cosine of adapters, against dense products and known subspaces."""

from __future__ import annotations

import pytest
import torch

from multigraft.inspection.change import Change
from multigraft.report.figures import figures_of
from multigraft.report.similarity import similarity


def sites(*changes: Change) -> dict:
    return {change.path: figures_of(change) for change in changes}


def change(path: str, seed: int, rank: int = 2, out: int = 10, in_: int = 8) -> Change:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(1, rank, in_, generator=generator)
    return Change(path, rank, (a, torch.randn(1, out, rank, generator=generator)))


def test_an_adapter_is_like_itself():
    own = sites(change("x", 1), change("y", 2))
    found = similarity("a", own, "b", own)
    assert found.sites == 2
    assert (found.output, found.input, found.cosine) == pytest.approx((1, 1, 1), rel=1e-4)
    assert found.chance == pytest.approx(0.2)


def test_the_cosine_is_that_of_dense_changes():
    mine, theirs = [change("x", 1), change("y", 2)], [change("x", 3, 3), change("y", 4)]
    dense = [torch.cat([c.matrices().flatten() for c in each]) for each in (mine, theirs)]
    expected = torch.cosine_similarity(*dense, dim=0)
    found = similarity("a", sites(*mine), "b", sites(*theirs))
    assert found.cosine == pytest.approx(float(expected), abs=1e-5)


def test_subspaces_that_share_one_of_two_directions_overlap_by_half():
    eye = torch.eye(8)
    first = Change("x", 2, (eye[None, :2], eye[:10, :2][None]))
    second = Change("x", 2, (eye[None, 4:6], eye[:10, 1:3][None]))
    found = similarity("a", sites(first), "b", sites(second))
    assert (found.output, found.input) == pytest.approx((0.5, 0))
    assert found.cosine == pytest.approx(0)


def test_a_subspace_within_a_larger_one_overlaps_wholly():
    eye = torch.eye(8)
    small = Change("x", 1, (eye[None, :1], eye[:, :1][None]))
    large = Change("x", 4, (eye[None, :4], eye[:, :4][None]))
    assert similarity("a", sites(small), "b", sites(large)).output == pytest.approx(1)


def test_sites_of_one_alone_or_of_another_shape_do_not_count():
    mine = sites(change("x", 1), change("y", 2), change("z", 3))
    theirs = sites(change("x", 4), change("y", 5, out=6))
    assert similarity("a", mine, "b", theirs).sites == 1


def test_nothing_in_common_is_no_figure():
    found = similarity("a", sites(change("x", 1)), "b", sites(change("y", 1)))
    assert (found.sites, found.output, found.cosine) == (0, None, None)


def test_an_adapter_that_changes_nothing_is_compared_with_nobody():
    a, b = change("x", 1).factors
    assert similarity("a", sites(Change("x", 2, (a, b * 0))), "b", sites(change("x", 2))).sites == 0
