"""The frozen linear layer with a pair on it: against its specification, in float64 and below."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from multigraft.kernels.adapted_linear import (
    Dropped,
    adapted_linear,
    adapted_linear_reference,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def make(
    lead: tuple[int, ...], in_: int, out: int, rank: int, bias: bool, dtype: torch.dtype, at: str
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    source = torch.Generator().manual_seed(in_ * out + rank)
    draw = lambda *s: torch.randn(*s, generator=source, dtype=torch.float64).to(at, dtype)  # noqa: E731
    x, A, B = draw(*lead, in_), draw(rank, in_), draw(out, rank)
    for leaf in (x, A, B):
        leaf.requires_grad_()
    return x, draw(out, in_), draw(out) if bias else None, A, B


@pytest.mark.parametrize("device", DEVICES)
@given(
    lead=st.sampled_from([(), (1,), (7,), (2, 3), (1024,), (2, 3, 2)]),
    in_=st.integers(1, 9),
    out=st.integers(1, 9),
    rank=st.integers(1, 5),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, -0.5, 3.0]),
)
def test_output_and_gradients_are_the_specifications(
    device: str, lead: tuple[int, ...], in_: int, out: int, rank: int, bias: bool, scale: float
) -> None:
    args = make(lead, in_, out, rank, bias, torch.float64, device)
    leaves = (args[0], args[3], args[4])
    y, expected = adapted_linear(*args, scale), adapted_linear_reference(*args, scale)
    torch.testing.assert_close(y, expected)
    weight = torch.randn(expected.shape, dtype=torch.float64).to(device)
    found = torch.autograd.grad((y * weight).sum(), leaves)
    for mine, theirs in zip(
        found, torch.autograd.grad((expected * weight).sum(), leaves), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
    with torch.no_grad():
        torch.testing.assert_close(adapted_linear(*args, scale), expected)


def test_gradients_are_those_of_finite_differences() -> None:
    x, W, bias, A, B = make((2, 3), 5, 4, 2, True, torch.float64, "cpu")
    assert torch.autograd.gradcheck(
        lambda x, A, B: adapted_linear(x, W, bias, A, B, 0.7), (x, A, B)
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [5, 1024])
def test_rounding_is_no_worse_than_part_by_part(
    device: str, dtype: torch.dtype, tokens: int
) -> None:
    exact = make((tokens,), 64, 48, 8, False, torch.float64, device)
    args = [None if t is None else t.detach().to(dtype) for t in exact]
    truth = adapted_linear_reference(*[None if t is None else t.double() for t in args], 0.5)
    ours = (adapted_linear(*args, 0.5).double() - truth).norm()
    parts = (adapted_linear_reference(*args, 0.5).double() - truth).norm()
    assert ours <= 1.5 * parts


def test_float32_factors_on_a_half_precision_layer_get_float32_gradients() -> None:
    x, W, _, A, B = make((4,), 8, 6, 2, False, torch.float32, "cpu")
    adapted_linear(x.bfloat16(), W.bfloat16(), None, A, B, 1.0).float().sum().backward()
    assert A.grad is not None and A.grad.dtype == torch.float32
    assert B.grad is not None and B.grad.dtype == torch.float32


def test_a_frozen_input_gets_no_gradient_and_the_factors_theirs() -> None:
    x, W, bias, A, B = make((4,), 8, 6, 2, True, torch.float64, "cpu")
    adapted_linear(x.detach(), W, bias, A, B, 1.0).sum().backward()
    assert A.grad is not None and B.grad is not None


def test_only_the_input_and_the_narrow_product_are_saved() -> None:
    x, W, _, A, B = make((10,), 64, 48, 2, False, torch.float64, "cpu")
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        adapted_linear(x, W, None, A, B, 1.0)
    assert sorted(tuple(t.shape) for t in saved) == sorted(
        [(10, 64), (48, 64), (2, 64), (48, 2), (10, 2)]
    )


def test_an_input_that_is_not_contiguous() -> None:
    x, W, bias, A, B = make((6, 4), 8, 6, 2, True, torch.float64, "cpu")
    turned = x.transpose(0, 1)
    torch.testing.assert_close(
        adapted_linear(turned, W, bias, A, B, 2.0),
        adapted_linear_reference(turned, W, bias, A, B, 2.0),
    )


def test_what_the_factors_see_may_differ_from_what_the_layer_sees() -> None:
    x, W, bias, A, B = make((2, 3), 5, 4, 2, True, torch.float64, "cpu")
    seen = (x.detach() * 0.5 + 1).requires_grad_()
    expected = F.linear(x, W, bias) + 0.7 * F.linear(F.linear(seen, A), B)
    torch.testing.assert_close(adapted_linear(x, W, bias, A, B, 0.7, Dropped(seen)), expected)
    assert torch.autograd.gradcheck(
        lambda x, A, B, seen: adapted_linear(x, W, bias, A, B, 0.7, Dropped(seen)),
        (x, A, B, seen),
    )
