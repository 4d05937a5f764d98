"""One sum tells whether a tensor is finite, whatever its dtype and however large its values."""

from __future__ import annotations

import pytest
import torch

from multigraft.finite import is_finite

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_bad_element_anywhere_is_seen(dtype: torch.dtype, bad: float) -> None:
    for place in (0, 17, 99):
        values = torch.ones(100)
        values[place] = bad
        assert not is_finite(values.to(dtype))
    assert is_finite(torch.ones(100).to(dtype))


def test_infinities_of_both_signs_do_not_cancel() -> None:
    assert not is_finite(torch.tensor([float("inf"), -float("inf"), 1.0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_whose_sum_overflows_are_finite(dtype: torch.dtype) -> None:
    assert is_finite(torch.full((100,), torch.finfo(dtype).max, dtype=dtype))


def test_counts_empty_and_meta_tensors_are_finite() -> None:
    assert is_finite(torch.arange(3))
    assert is_finite(torch.empty(0))
    assert is_finite(torch.empty(3, device="meta"))
