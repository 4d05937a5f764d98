"""Rows of many adapters: every way against the row-by-row specification."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from multigraft.kernels.routed import grouped, masked, routed_reference
from multigraft.routing import BASE, Route

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
IN, OUT, RANK = 6, 5, 3


class Case(NamedTuple):
    y: Tensor
    x: Tensor
    A: Tensor
    B: Tensor
    scale: Tensor
    owner: Tensor


def make(owner: list[int], lead: tuple[int, ...], device: str) -> Case:
    """Rows with these owners (-1: none); the second adapter has a lower rank than the others."""
    source = torch.Generator().manual_seed(len(owner))
    draw = lambda *s: torch.randn(*s, generator=source, dtype=torch.float64).to(device)  # noqa: E731
    adapters = max(owner) + 1
    A, B = draw(adapters, RANK, IN), draw(adapters, RANK, OUT)
    if adapters > 1:
        A[1, -1], B[1, -1] = 0.0, 0.0
    rows = len(owner)
    scale = draw(adapters)
    return Case(draw(rows, *lead, OUT), draw(rows, *lead, IN), A, B, scale, torch.tensor(owner))


def names(owner: list[int]) -> list[str]:
    return [BASE if adapter < 0 else f"a{adapter}" for adapter in owner]


@st.composite
def owners(draw: st.DrawFn) -> list[int]:
    """Any rows, every adapter with at least one."""
    adapters = draw(st.integers(1, 4))
    more = draw(st.lists(st.integers(-1, adapters - 1), max_size=5))
    return draw(st.permutations([*range(adapters), *more]))


@pytest.mark.parametrize("device", DEVICES)
@given(owner=owners(), lead=st.sampled_from([(), (1,), (4,), (2, 3)]))
def test_grouped_and_masked_are_row_by_row(
    device: str, owner: list[int], lead: tuple[int, ...]
) -> None:
    case = make(owner, lead, device)
    expected = routed_reference(*case)
    adapters = tuple((f"a{i}",) for i in range(max(owner) + 1))
    grouping = Route(names(owner)).grouping(case.x, adapters)
    scale = grouping.valid.to(case.scale) * case.scale[:, None]
    y, x, A, B = case[:4]
    found = grouped(y, x, A, B, scale, grouping.slots, grouping.in_order)
    torch.testing.assert_close(found, expected)
    mask = (grouping.one_hot.to(case.scale) * case.scale).repeat_interleave(RANK, dim=1)
    torch.testing.assert_close(masked(y, x, A, B, mask), expected)
