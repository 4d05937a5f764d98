"""Dropout by a regenerated mask: the plain operators, and the kernels against them.

Triton's interpreter runs the kernels on a CPU, in a process of its own (`interpreted.py`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from multigraft.kernels.regenerated import (
    draw_seed,
    dropped_factor_gradient,
    dropped_input,
    dropped_input_gradient,
    dropped_shrink,
    keeps,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def seed(value: int = 7, device: str = "cpu") -> Tensor:
    return torch.tensor([value], dtype=torch.int32, device=device)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_so_many_are_dropped_as_the_rate_says(p: float) -> None:
    share = 1 - keeps(seed(), 1000, 300, p).double().mean().item()
    assert abs(share - p) < 4 * (p * (1 - p) / 300_000) ** 0.5


def test_neighbours_rows_and_seeds_have_nothing_to_do_with_each_other() -> None:
    first, second = (keeps(seed(s), 500, 400, 0.5).double() - 0.5 for s in (7, 8))
    for one, other in [
        (first[:, 1:], first[:, :-1]),
        (first[1:], first[:-1]),
        (first, second),
        (first[:, ::2], first[:, 1::2]),
    ]:
        assert abs((one * other).mean().item()) < 0.25 * 4 / one.numel() ** 0.5


def test_the_same_seed_drops_the_same_and_the_generator_decides_it() -> None:
    torch.manual_seed(3)
    one = draw_seed(torch.ones(1))
    torch.manual_seed(3)
    assert torch.equal(one, draw_seed(torch.ones(1)))
    assert not torch.equal(one, draw_seed(torch.ones(1)))


def by_the_paper(index: int, own: int) -> int:
    """lowbias32 of an index and a seed, in integers of any size."""
    h = (index ^ own) & 0xFFFFFFFF
    h = (h ^ (h >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    h = (h ^ (h >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return h ^ (h >> 16)


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=3), st.floats(0, 0.999))
def test_an_element_is_kept_by_the_hash_of_its_rows_seed_and_its_place_in_the_row(
    seeds: list[int], p: float
) -> None:
    kept = keeps(torch.tensor(seeds, dtype=torch.int32), 2 * len(seeds), 5, p)
    wanted = [[by_the_paper(i, own) >= round(p * 2**32) for i in range(10)] for own in seeds]
    assert kept.view(len(seeds), 10).tolist() == wanted


def test_longer_rows_begin_as_shorter_ones_and_each_may_have_a_rate() -> None:
    seeds = torch.tensor([5, -9], dtype=torch.int32)
    rates = torch.tensor([0.25, 0.0], dtype=torch.float64)
    short, long = (keeps(seeds, 2 * n, 6, 0.25).view(2, n, 6) for n in (4, 7))
    assert torch.equal(long[:, :4], short)
    each = keeps(seeds, 14, 6, rates).view(2, 7, 6)
    assert torch.equal(each[0], long[0]) and each[1].all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "width", "rank"), [(5, 7, 1), (70, 200, 3), (600, 320, 48)])
def test_products_are_those_with_the_dropped_input(
    device: str, dtype: torch.dtype, tokens: int, width: int, rank: int
) -> None:
    torch.manual_seed(0)
    x, A, ds = (
        torch.randn(*shape).to(device, dtype)
        for shape in ((tokens, width), (rank, width), (tokens, rank))
    )
    own, p = torch.arange(5, dtype=torch.int32, device=device), 0.25
    seen, mask = dropped_input(x.double(), own, p), keeps(own, tokens, width, p)
    near = {"rtol": 2e-2, "atol": 0.3} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-3}
    exact = [t.double() for t in (A, ds)]
    for found, wanted in [
        (dropped_shrink(x, A, own, p), seen @ exact[0].T),
        (dropped_factor_gradient(ds, x, own, p), exact[1].T @ seen),
        (dropped_input_gradient(ds, A, own, p), (exact[1] @ exact[0]) * mask / (1 - p)),
    ]:
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, **near)


def test_the_kernels_are_the_plain_operators_under_tritons_interpreter() -> None:
    pytest.importorskip("triton")
    script = Path(__file__).with_name("interpreted.py")
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, str(script)], env=env, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("equal") == 12
