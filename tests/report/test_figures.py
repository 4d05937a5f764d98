"""Figures from factors are those of the dense product."""

from __future__ import annotations

import math

import pytest
import torch

from multigraft.inspection.change import Change
from multigraft.report.figures import figures_of, place_of


def factors(*sizes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    pairs, rank, in_, out = sizes
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(pairs, rank, in_, generator=generator),
        torch.randn(pairs, out, rank, generator=generator),
    )


@pytest.mark.parametrize("sizes", [(1, 3, 8, 6), (1, 1, 4, 4), (1, 9, 5, 7), (4, 2, 6, 3)], ids=str)
def test_singular_values_are_those_of_the_product(sizes):
    a, b = factors(*sizes)
    found = figures_of(Change("x", 3, (a, b)))
    S = torch.linalg.svdvals(b.double() @ a.double()).flatten().sort(descending=True).values
    assert found.values == pytest.approx([*S[: len(found.values)].tolist()], rel=1e-4, abs=1e-5)
    assert float(S[len(found.values) :].sum()) == pytest.approx(0, abs=1e-6)
    assert found.norm == pytest.approx(float((b @ a).norm()), rel=1e-5)


def test_directions_rebuild_the_change():
    a, b = factors(1, 3, 8, 6)
    found = figures_of(Change("x", 3, (a, b)))
    S = torch.tensor(found.values)
    assert torch.allclose(found.left @ S.diag() @ found.right.mT, (b @ a)[0], atol=1e-5)


def test_a_change_without_factors_is_decomposed_as_it_is():
    a, b = factors(1, 3, 8, 6)
    thin, dense = figures_of(Change("x", 3, (a, b))), figures_of(Change("x", 0, None, b @ a))
    assert dense.values[:3] == pytest.approx(thin.values[:3], rel=1e-4)
    assert dense.norm == pytest.approx(thin.norm, rel=1e-5)
    assert dense.left.shape == (6, 3)


def test_the_effective_rank_counts_equal_directions():
    eye = torch.eye(4)[None]
    assert figures_of(Change("x", 4, (eye, eye))).effective_rank == pytest.approx(4)
    one = torch.diag(torch.tensor([1.0, 0, 0, 0]))[None]
    assert figures_of(Change("x", 4, (one, eye))).effective_rank == pytest.approx(1)
    two = torch.diag(torch.tensor([3.0, 1, 0, 0]))[None]
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert figures_of(Change("x", 4, (two, eye))).effective_rank == pytest.approx(
        math.exp(entropy), rel=1e-5
    )


def test_a_change_of_nothing_has_no_directions():
    a, b = factors(1, 3, 8, 6)
    found = figures_of(Change("x", 3, (a, b * 0)))
    assert (found.norm, found.effective_rank, found.left.shape) == (0, 0, (6, 0))


def test_values_that_are_not_finite_are_no_error():
    a, b = factors(1, 3, 8, 6)
    a[0, 0, 0] = float("nan")
    found = figures_of(Change("x", 3, (a, b)))
    assert found.values == ()
    assert math.isnan(found.norm)


def test_the_norm_is_beside_that_of_the_weight():
    a, b = factors(1, 3, 8, 6)
    found = figures_of(Change("x", 3, (a, b), None, 2 * b @ a))
    assert found.relative == pytest.approx(0.5)
    assert figures_of(Change("x", 3, (a, b))).relative is None


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("model.layers.3.self_attn.q_proj", (3, "self_attn.q_proj")),
        ("h.11.attn.c_attn", (11, "attn.c_attn")),
        ("layers.2.experts.17.w1", (2, "experts.*.w1")),
        ("lm_head", (None, "lm_head")),
        ("blocks.0", (0, "blocks")),
        ("3.up", (3, "up")),
    ],
)
def test_a_path_has_a_layer_and_a_module(path, place):
    assert place_of(path) == place
