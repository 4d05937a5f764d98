"""The fused low-rank addition against its specification in plain operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from multigraft.kernels.low_rank import low_rank_add, low_rank_add_reference

SHAPES = [(), (1,), (5,), (0,), (2, 3), (2, 0, 3), (2, 1, 4)]
"""Leading axes of the input."""


def tensors(
    lead: tuple[int, ...] = (5,),
    in_: int = 7,
    rank: int = 3,
    out: int = 4,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, x, A, B; seeded."""
    source = torch.Generator().manual_seed(in_ * 100 + out)
    shapes = ((*lead, out), (*lead, in_), (rank, in_), (out, rank))
    y, x, A, B = (torch.randn(s, generator=source, dtype=torch.float64).to(dtype) for s in shapes)
    return y, x, A, B


@pytest.mark.parametrize(("in_", "rank", "out"), [(7, 3, 4), (1, 1, 1), (3, 8, 2)])
@pytest.mark.parametrize("lead", SHAPES, ids=str)
def test_it_is_its_specification_for_any_leading_axes_and_ranks(
    lead: tuple[int, ...], in_: int, rank: int, out: int
) -> None:
    given = tensors(lead, in_, rank, out)
    torch.testing.assert_close(low_rank_add(*given, 1.7), low_rank_add_reference(*given, 1.7))


def test_inputs_that_are_not_contiguous_are_taken_as_they_are() -> None:
    y, x, A, B = tensors((3, 4), in_=6, out=8)
    y, x, A, B = (t.transpose(0, 1) for t in (y, x, A.T.contiguous(), B.T.contiguous()))
    assert not any(t.is_contiguous() for t in (y, x, A, B))
    torch.testing.assert_close(
        low_rank_add(y, x, A, B, -0.5), low_rank_add_reference(y, x, A, B, -0.5)
    )


@pytest.mark.parametrize("lead", [(5,), (2, 3), ()], ids=str)
def test_every_gradient_is_that_of_the_function(lead: tuple[int, ...]) -> None:
    given = [t.requires_grad_() for t in tensors(lead)]
    assert torch.autograd.gradcheck(lambda *t: low_rank_add(*t, 1.7), given)
    assert torch.autograd.gradgradcheck(lambda *t: low_rank_add(*t, 1.7), given)


def test_no_argument_is_changed() -> None:
    given = tensors()
    copies = [t.clone() for t in given]
    low_rank_add(*given, 1.7)
    assert all(torch.equal(t, c) for t, c in zip(given, copies, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_factors_serve_half_precision_and_get_float32_gradients(dtype: torch.dtype) -> None:
    y, x, _, _ = tensors((40,), in_=32, rank=4, out=16, dtype=dtype)
    _, _, A, B = (t.requires_grad_() for t in tensors((40,), 32, 4, 16, torch.float32))
    z = low_rank_add(y, x, A, B, 0.5)
    z.float().square().sum().backward()
    assert z.dtype == dtype
    assert A.grad is not None and B.grad is not None
    assert A.grad.dtype == B.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_rounds_no_worse_than_its_specification(dtype: torch.dtype) -> None:
    given = tensors((200,), in_=64, rank=8, out=48, dtype=dtype)
    truth = low_rank_add_reference(*(t.double() for t in given), 0.5)
    own, plain = (
        float((f(*given, 0.5).double() - truth).norm())
        for f in (low_rank_add, low_rank_add_reference)
    )
    assert own <= 1.01 * plain


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("seen", [torch.bfloat16, torch.float32])
def test_the_result_has_the_dtype_of_what_is_added_to(base: torch.dtype, seen: torch.dtype) -> None:
    y, x, A, B = tensors(dtype=torch.float32)
    z = low_rank_add(y.to(base), x.to(seen), A, B, 0.5)
    truth = low_rank_add_reference(y, x, A, B, 0.5)
    assert z.dtype == base
    torch.testing.assert_close(z.float(), truth, atol=0.2, rtol=0.05)


def test_under_autocast_the_operators_choose_and_the_result_keeps_its_dtype() -> None:
    y, x, A, B = tensors(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        z = low_rank_add(y.bfloat16(), x, A, B, 0.5)
    assert z.dtype == torch.bfloat16
    torch.testing.assert_close(
        z.float(), low_rank_add_reference(y, x, A, B, 0.5), atol=0.2, rtol=0.05
    )


def test_no_temporary_is_as_wide_as_the_output() -> None:
    y, x, A, B = tensors((6,), in_=5, rank=2, out=1000)
    known = {t.untyped_storage().data_ptr() for t in (y, x, A, B)}
    made: list[Tensor] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if result.untyped_storage().data_ptr() not in known:
                known.add(result.untyped_storage().data_ptr())
                made.append(result)
            return result

    with Watch(), torch.no_grad():
        low_rank_add(y, x, A, B, 0.5)
    assert [t.numel() for t in made] == [6 * 2, 6 * 1000]
