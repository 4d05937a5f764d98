"""The node of a reweighted layer against plain operators: values, first and second gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from multigraft.kernels.reweighted_linear import (
    Reweighted,
    reweighted_linear_reference,
    reweighted_linears,
)

SCALE = 0.7


class Given:
    """A norm; with the product that it is asked with."""

    def __init__(self, n: Tensor, is_kept: bool = False) -> None:
        self.n, self.is_kept = n, is_kept
        self.products: list[Tensor] = []

    def kept(self) -> Tensor | None:
        return self.n if self.is_kept else None

    def __call__(self, product: Tensor | None = None) -> Tensor:
        self.products += [] if product is None else [product]
        return self.n


def reweighted_linear(x: Tensor, **layer: Any) -> Tensor:
    return reweighted_linears(x, [Reweighted(**layer)])[0]


def tensors(
    shape: tuple[int, ...], out: int, rank: int, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """Inputs of both, which are leaves; ``norm`` gives a constant."""
    source = torch.Generator().manual_seed(0)

    def made(*size: int, trained: bool = True) -> Tensor:
        value = torch.randn(size, generator=source, dtype=torch.float64).to(dtype)
        return value.requires_grad_(trained)

    n = made(out, trained=False).abs() + 0.5
    return {
        "x": made(*shape),
        "W": made(out, shape[-1], trained=False),
        "bias": made(out, trained=False),
        "A": made(rank, shape[-1]),
        "B": made(out, rank),
        "scale": SCALE,
        "m": made(out),
        "norm": Given(n),
    }


def trained(inputs: dict[str, Any]) -> dict[str, Tensor]:
    return {n: t for n, t in inputs.items() if isinstance(t, Tensor) and t.requires_grad}


@given(
    lead=st.lists(st.integers(0, 4), max_size=3),
    sizes=st.tuples(*[st.integers(1, 5)] * 3),
    bias=st.booleans(),
)
def test_values_and_gradients_are_those_of_plain_operators(
    lead: list[int], sizes: tuple[int, int, int], bias: bool
) -> None:
    in_, out, rank = sizes
    inputs = tensors((*lead, in_) if lead else (3, in_), out, rank)
    if not bias:
        inputs["bias"] = None
    found, expected = reweighted_linear(**inputs), reweighted_linear_reference(**inputs)
    torch.testing.assert_close(found, expected)
    weights = torch.arange(found.numel(), dtype=found.dtype).view(found.shape).cos()
    leaves = [*trained(inputs).values()]
    torch.testing.assert_close(
        torch.autograd.grad((found * weights).sum(), leaves),
        torch.autograd.grad((expected * weights).sum(), leaves),
    )


def test_many_tokens_give_the_same() -> None:
    inputs = tensors((1027, 5), 7, 2)
    torch.testing.assert_close(reweighted_linear(**inputs), reweighted_linear_reference(**inputs))


def test_second_gradients_are_those_of_finite_differences() -> None:
    inputs = tensors((3, 4), 5, 2)
    leaves = trained(inputs)

    def run(*values: Tensor) -> Tensor:
        return reweighted_linear(**{**inputs, **dict(zip(leaves, values, strict=True))})

    assert torch.autograd.gradgradcheck(run, tuple(leaves.values()))


@pytest.mark.parametrize("name", ["x", "A", "B", "m"])
def test_only_what_is_asked_for_gets_a_gradient(name: str) -> None:
    inputs = tensors((3, 4), 5, 2)
    for other, leaf in trained(inputs).items():
        leaf.requires_grad_(other == name)
    expected = torch.autograd.grad(reweighted_linear_reference(**inputs).sum(), inputs[name])
    reweighted_linear(**inputs).sum().backward()
    torch.testing.assert_close(inputs[name].grad, *expected)
    assert all(inputs[other].grad is None for other in ("x", "A", "B", "m") if other != name)


def test_the_output_may_be_written_to() -> None:
    inputs = tensors((2, 3, 4), 5, 2)
    relu = nn.ReLU(inplace=True)
    found = torch.autograd.grad(relu(reweighted_linear(**inputs)).sum(), inputs["m"])
    expected = torch.autograd.grad(reweighted_linear_reference(**inputs).relu().sum(), inputs["m"])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_each_output_a_few_times(dtype: torch.dtype) -> None:
    inputs = tensors((6, 16), 8, 2, dtype)
    for name in ("A", "B", "m"):
        inputs[name] = inputs[name].detach().float().requires_grad_()
    wide = {n: t.double() if isinstance(t, Tensor) else t for n, t in inputs.items()}
    found, expected = reweighted_linear(**inputs), reweighted_linear_reference(**wide)
    assert found.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=8 * eps, atol=8 * eps)
    found.float().sum().backward()
    assert inputs["m"].grad.dtype == torch.float32
    expected = torch.autograd.grad(reweighted_linear_reference(**wide).sum(), wide["m"])[0]
    torch.testing.assert_close(inputs["m"].grad.double(), expected, rtol=16 * eps, atol=64 * eps)


@pytest.mark.parametrize("bias", [True, False])
def test_a_magnitude_of_zero_gets_its_gradient(bias: bool) -> None:
    inputs = tensors((6, 4), 5, 2)
    inputs["bias"] = inputs["bias"] if bias else None
    with torch.no_grad():
        inputs["m"][2] = 0.0
    leaves = [*trained(inputs).values()]
    found = torch.autograd.grad(reweighted_linear(**inputs).cos().sum(), leaves)
    expected = torch.autograd.grad(reweighted_linear_reference(**inputs).cos().sum(), leaves)
    torch.testing.assert_close(found, expected)


def test_what_is_kept_beside_x_is_the_output_alone() -> None:
    inputs, kept = tensors((64, 4), 32, 2), []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = reweighted_linear(**inputs)
    assert [t.data_ptr() for t in kept if t.shape == (64, 32)] == [y.data_ptr()]


@pytest.mark.parametrize("lead", [(), (2,)])
def test_kept_values_are_not_trusted_once_the_output_was_written_to(lead: tuple[int, ...]) -> None:
    inputs = tensors((*lead, 3, 4), 5, 2)
    leaves = [*trained(inputs).values()]
    y = reweighted_linear(**inputs)
    found = torch.autograd.grad(y.mul_(2.0).sum(), leaves)
    expected = torch.autograd.grad((reweighted_linear_reference(**inputs) * 2.0).sum(), leaves)
    torch.testing.assert_close(found, expected)


@given(
    tokens=st.integers(0, 12),
    in_=st.integers(1, 4),
    outs=st.lists(st.integers(1, 5), min_size=2, max_size=3),
    unused=st.booleans(),
    kept=st.booleans(),
)
def test_layers_of_one_input_are_those_by_themselves(
    tokens: int, in_: int, outs: list[int], unused: bool, kept: bool
) -> None:
    layers = [tensors((tokens, in_), out, rank) for rank, out in enumerate(outs, 1)]
    x = layers[0]["x"]
    for layer in layers:
        del layer["x"]
        layer["norm"].is_kept = kept
    layers[0]["bias"] = None
    found = reweighted_linears(x, [Reweighted(**layer) for layer in layers])
    expected = [reweighted_linear_reference(x, **layer) for layer in layers]
    torch.testing.assert_close(found, expected)
    leaves = [x, *(t for layer in layers[unused:] for t in trained(layer).values())]
    losses = [sum(y.cos().sum() for y in ys[unused:]) for ys in (found, expected)]
    torch.testing.assert_close(*(torch.autograd.grad(loss, leaves) for loss in losses))


def test_the_norms_product_is_taken_along_unless_the_norm_is_kept() -> None:
    inputs = tensors((3, 4), 5, 2)
    reweighted_linear(**inputs)
    torch.testing.assert_close(inputs["norm"].products, [inputs["A"] @ inputs["W"].T])
    inputs["norm"] = Given(inputs["norm"].n, is_kept=True)
    reweighted_linear(**inputs)
    assert inputs["norm"].products == []


def test_one_node_serves_all_layers_of_one_input() -> None:
    layers = [tensors((6, 4), out, 2) for out in (5, 3)]
    x = layers[0].pop("x")
    layers[1].pop("x")
    ys = reweighted_linears(x, [Reweighted(**layer) for layer in layers])
    assert ys[0].grad_fn is ys[1].grad_fn
