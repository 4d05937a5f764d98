"""Reweighted matrices against plain operators: values, first and second gradients, what is kept."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from multigraft.kernels.reweighted_matrices import (
    reweighted_matrices,
    reweighted_matrices_reference,
)


def inputs(n: int, out: int, in_: int, rank: int) -> list[Tensor]:
    """W, A, B and m, of which W takes no gradient."""
    source = torch.Generator().manual_seed(0)
    shapes = ((n, out, in_), (n, rank, in_), (n, out, rank), (n, out))
    made = [torch.randn(shape, generator=source, dtype=torch.float64) for shape in shapes]
    return [made[0], *(tensor.requires_grad_() for tensor in made[1:])]


@given(sizes=st.tuples(*[st.integers(1, 4)] * 4), is_turned=st.booleans())
def test_values_and_gradients_are_those_of_plain_operators(
    sizes: tuple[int, int, int, int], is_turned: bool
) -> None:
    W, A, B, m = inputs(*sizes)
    W = W.mT.contiguous().mT if is_turned else W
    found = reweighted_matrices(W, A, B, 0.7, m)
    expected = reweighted_matrices_reference(W, A, B, 0.7, m)
    torch.testing.assert_close(found, expected)
    weights = torch.arange(found.numel(), dtype=found.dtype).view(found.shape).cos()
    torch.testing.assert_close(
        torch.autograd.grad((found * weights).sum(), [A, B, m]),
        torch.autograd.grad((expected * weights).sum(), [A, B, m]),
    )


def test_nothing_as_large_as_the_matrices_is_kept_beside_them() -> None:
    W, A, B, m = inputs(3, 40, 50, 2)
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        reweighted_matrices(W, A, B, 0.7, m)
    assert [t.data_ptr() for t in kept if t.shape == W.shape] == [W.data_ptr()]


def test_the_matrices_stay_as_they_are() -> None:
    W, A, B, m = inputs(2, 4, 5, 2)
    before = W.clone()
    reweighted_matrices(W, A, B, 0.7, m)
    assert torch.equal(W, before)
