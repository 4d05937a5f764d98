"""The compressed layer against its specification in plain operators."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from multigraft.kernels.compressed import compressed_linear, compressed_linear_reference, group_size


@given(
    tokens=st.integers(0, 5),
    in_=st.integers(1, 9),
    groups=st.integers(1, 11),
    rank=st.integers(1, 3),
)
def test_value_and_gradients_are_those_of_plain_operators(
    tokens: int, in_: int, groups: int, rank: int
) -> None:
    source = torch.Generator().manual_seed(0)
    made = [
        torch.randn(size, generator=source, dtype=torch.float64)
        for size in ((2, tokens, in_), (rank, in_), (group_size(in_, groups),))
    ]
    x, A, e = made[0].requires_grad_(), made[1].requires_grad_(), made[2]
    found = compressed_linear(x, A, e, groups, 0.7)
    expected = compressed_linear_reference(x, A, e, groups, 0.7)
    torch.testing.assert_close(found, expected)
    weights = torch.arange(found.numel(), dtype=found.dtype).view(found.shape).cos()
    torch.testing.assert_close(
        torch.autograd.grad((found * weights).sum(), [x, A]),
        torch.autograd.grad((expected * weights).sum(), [x, A]),
    )


def test_with_a_group_for_each_feature_the_gradient_is_exact() -> None:
    x, A = torch.randn(4, 6), torch.randn(2, 6, requires_grad=True)
    compressed_linear(x, A, torch.ones(1), 6, 1.0).square().sum().backward()
    (expected,) = torch.autograd.grad((x @ A.T).square().sum(), A)
    torch.testing.assert_close(A.grad, expected)


def test_under_autocast_gradients_have_the_dtypes_of_what_they_are_of() -> None:
    x, A = torch.randn(4, 6, requires_grad=True), torch.randn(2, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        h = compressed_linear(x, A, torch.ones(1), 6, 1.0)
    assert h.dtype == torch.bfloat16
    h.float().square().sum().backward()
    expected = torch.autograd.grad((x @ A.T).square().sum(), [x, A])
    torch.testing.assert_close([x.grad, A.grad], [*expected], rtol=0.05, atol=0.1)
