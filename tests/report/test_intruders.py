"""Intruder dimensions are counted as the paper defines them."""

from __future__ import annotations

import pytest
import torch

from multigraft.report import count_intruders


def base(out: int = 12, in_: int = 8) -> torch.Tensor:
    """A weight whose singular values are 8, 7, … and whose vectors are random."""
    torch.manual_seed(0)
    U = torch.linalg.qr(torch.randn(out, out)).Q[:, : min(out, in_)]
    V = torch.linalg.qr(torch.randn(in_, in_)).Q[:, : min(out, in_)]
    S = torch.arange(min(out, in_), 0, -1, dtype=torch.float32)
    return (U @ S.diag() @ V.mT)[None]


def test_no_change_brings_no_intruder():
    assert count_intruders(base(), torch.zeros(1, 12, 8)) == 0


def test_scaling_what_is_there_brings_none():
    W = base()
    U, _, Vh = torch.linalg.svd(W[0], full_matrices=False)
    delta = 20 * U[:, 3:4] @ Vh[3:4]
    assert count_intruders(W, delta[None]) == 0


def test_a_strong_new_direction_is_one():
    W = base()
    U = torch.linalg.svd(W[0])[0]
    new = U[:, -1:]  # outside of what W writes to
    delta = 50 * new @ torch.ones(1, 8)
    assert count_intruders(W, delta[None]) == 1


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (8, 8)], ids=str)
def test_it_is_the_definition_spelt_out(shape):
    W = base(*shape)
    torch.manual_seed(1)
    delta = 3 * torch.randn(1, *shape)
    known = torch.linalg.svd(W[0].double(), full_matrices=False)[0].T
    leading = torch.linalg.svd((W + delta)[0].double(), full_matrices=False)[0].T[:5]
    expected = sum(max(abs(float(u @ w)) for w in known) < 0.6 for u in leading)
    assert expected > 0
    assert count_intruders(W, delta, k=5, epsilon=0.6) == expected


def test_large_or_broken_matrices_are_not_searched():
    W = base()
    assert count_intruders(W, torch.zeros_like(W), largest=7) is None
    assert count_intruders(W, torch.full_like(W, float("inf"))) is None
