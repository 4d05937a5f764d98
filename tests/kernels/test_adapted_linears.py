"""Several frozen layers and several adapters in one node: against one layer and adapter at a time.

Every case is in float64 and has layers of different widths, adapters of different ranks and scales.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from multigraft.kernels import Part, Seeded, Stack
from multigraft.kernels.adapted_linear import (
    Dropped,
    adapted_linear_reference,
    adapted_linears,
)
from multigraft.kernels.regenerated import keeps

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
IN = 5


def make(
    layers: int, adapters: int, rows: int, lead: tuple[int, ...], device: str = "cpu"
) -> tuple[Tensor, list[Part]]:
    """An input with ``rows`` rows for each adapter, and layers; all leaves take gradients."""
    source = torch.Generator().manual_seed(layers * 100 + adapters * 10 + rows)
    draw = lambda *s: torch.randn(*s, generator=source, dtype=torch.float64).to(device)  # noqa: E731
    leaf = lambda *s: draw(*s).requires_grad_()  # noqa: E731
    parts = []
    for i in range(layers):
        out = 3 + i
        ranks = [1 + (i + g) % 3 for g in range(adapters)]
        scales = tuple(0.5 + g * (i % 2) for g in range(adapters))
        A, B = tuple(leaf(r, IN) for r in ranks), tuple(leaf(out, r) for r in ranks)
        parts.append(Part(draw(out, IN), draw(out) if i % 2 else None, A, B, scales))
    return leaf(adapters * rows, *lead, IN), parts


def by_hand(x: Tensor, parts: list[Part], seen: Tensor | None = None) -> list[Tensor]:
    """Each layer and each adapter's rows by themselves."""
    ys = []
    for part in parts:
        rows = []
        each = x.shape[0] // len(part.A)
        for g, (A, B, scale) in enumerate(zip(part.A, part.B, part.scale, strict=True)):
            own = slice(g * each, (g + 1) * each)
            if seen is None:
                rows.append(adapted_linear_reference(x[own], part.W, part.bias, A, B, scale))
            else:
                update = F.linear(F.linear(seen[own], A), B) * scale
                rows.append(F.linear(x[own], part.W, part.bias) + update)
        ys.append(torch.cat(rows))
    return ys


def leaves(x: Tensor, parts: list[Part]) -> list[Tensor]:
    return [x, *(t for part in parts for t in (*part.A, *part.B))]


def check(found: list[Tensor], expected: list[Tensor], wanted: list[Tensor]) -> None:
    """Equal outputs, and equal gradients of a sum in which each output has its own weights."""
    weights = [torch.randn(y.shape, dtype=torch.float64).to(y.device) for y in expected]
    grads = []
    for ys in (found, expected):
        loss = sum((y * w).sum() for y, w in zip(ys, weights, strict=True))
        assert isinstance(loss, Tensor)
        grads.append(torch.autograd.grad(loss, wanted))
    for one, two in zip((*found, *grads[0]), (*expected, *grads[1]), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("device", DEVICES)
@given(
    layers=st.integers(1, 3),
    adapters=st.integers(1, 3),
    rows=st.sampled_from([1, 2, 1024]),
    lead=st.sampled_from([(), (3,)]),
)
def test_outputs_and_gradients_are_those_of_each_layer_and_adapter_alone(
    device: str, layers: int, adapters: int, rows: int, lead: tuple[int, ...]
) -> None:
    x, parts = make(layers, adapters, rows, lead, device)
    check(adapted_linears(x, parts), by_hand(x, parts), leaves(x, parts))
    with torch.no_grad():
        for ys in (
            adapted_linears(x, parts),
            adapted_linears(x, parts, None, Stack.of(parts, x.dtype)),
        ):
            for one, two in zip(ys, by_hand(x, parts), strict=True):
                torch.testing.assert_close(one, two)


@pytest.mark.parametrize(("layers", "adapters"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_first_and_second_gradients_are_those_of_finite_differences(
    layers: int, adapters: int
) -> None:
    x, parts = make(layers, adapters, 1, (2,))

    def run(x: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        left, own = list(factors), []
        for part in parts:
            A, left = tuple(left[: len(part.A)]), left[len(part.A) :]
            B, left = tuple(left[: len(part.B)]), left[len(part.B) :]
            own.append(part._replace(A=A, B=B))
        return tuple(adapted_linears(x, own))

    assert torch.autograd.gradcheck(run, leaves(x, parts))
    assert torch.autograd.gradgradcheck(run, leaves(x, parts))


@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("adapters", [1, 2])
def test_a_dropout_that_the_factors_see_gets_its_gradient_either_way(
    with_mask: bool, adapters: int
) -> None:
    x, parts = make(2, adapters, 2, (3,))
    seen, mask = torch.native_dropout(x, 0.5, True)
    dropped = Dropped(seen, mask, 2.0) if with_mask else Dropped(seen)
    expected = by_hand(x, parts, x * mask * 2.0)
    check(adapted_linears(x, parts, dropped), expected, leaves(x, parts))


@pytest.mark.parametrize("layers", [1, 2])
def test_a_dropout_by_seed_is_that_of_its_mask(layers: int) -> None:
    x, parts = make(layers, 1, 6, (3,))
    own = Seeded(torch.tensor([5], dtype=torch.int32), 0.5)
    mask = keeps(own.seed, 18, IN, own.p).view(x.shape)
    check(adapted_linears(x, parts, own), by_hand(x, parts, x * mask * 2.0), leaves(x, parts))
    with torch.no_grad():
        for one, two in zip(
            adapted_linears(x, parts, own), by_hand(x, parts, x * mask * 2.0), strict=True
        ):
            torch.testing.assert_close(one, two)


def test_second_gradients_go_through_a_dropout_by_seed() -> None:
    x, parts = make(1, 1, 4, ())
    own = Seeded(torch.tensor([5], dtype=torch.int32), 0.5)

    def run(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return adapted_linears(x, [parts[0]._replace(A=(A,), B=(B,))], own)[0]

    assert torch.autograd.gradgradcheck(run, (x, *parts[0].A, *parts[0].B))


def test_second_gradients_go_through_a_dropout() -> None:
    x, parts = make(1, 1, 2, (3,))
    mask = torch.native_dropout(x, 0.5, True)[1]

    def second(run: Callable[[], Tensor]) -> Tensor:
        (first,) = torch.autograd.grad(run().pow(2).sum(), parts[0].A, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), x)[0]

    mine = second(lambda: adapted_linears(x, parts, Dropped(x * mask * 2.0, mask, 2.0))[0])
    torch.testing.assert_close(mine, second(lambda: by_hand(x, parts, x * mask * 2.0)[0]))


@pytest.mark.parametrize("used", [0, 1])
def test_a_layer_whose_output_is_not_used_gets_no_gradient_and_costs_the_others_nothing(
    used: int,
) -> None:
    x, parts = make(2, 2, 1, (2,))
    adapted_linears(x, parts)[used].sum().backward()
    found = [x.grad, *(t.grad for t in (*parts[used].A, *parts[used].B))]
    x.grad = None
    assert all(t.grad is None for t in (*parts[1 - used].A, *parts[1 - used].B))
    expected = torch.autograd.grad(by_hand(x, parts)[used].sum(), leaves(x, [parts[used]]))
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two)


def test_gradients_of_one_adapters_rows_reach_no_other_adapter() -> None:
    x, parts = make(1, 3, 2, (4,))
    adapted_linears(x, parts)[0][2:4].sum().backward()
    for factors in (parts[0].A, parts[0].B):
        grads = [t.grad for t in factors]
        assert all(g is not None for g in grads)
        assert [bool(g.count_nonzero()) for g in grads if g is not None] == [False, True, False]


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("lead", [(), (3,)])
def test_what_comes_after_may_write_to_the_outputs(
    layers: int, adapters: int, lead: tuple[int, ...]
) -> None:
    x, parts = make(layers, adapters, 2, lead)
    ys = [y.relu_() for y in adapted_linears(x, parts)]
    check(ys, [y.relu() for y in by_hand(x, parts)], leaves(x, parts))


def test_the_input_is_saved_once_for_all_layers() -> None:
    x, parts = make(3, 1, 9, ())
    shapes: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t
    ):
        adapted_linears(x, parts)
    assert shapes.count(tuple(x.shape)) == 1


def test_gradients_of_frozen_factors_are_not_computed() -> None:
    x, parts = make(2, 2, 1, (2,))
    frozen = [*parts[0].A, *parts[1].B, x]
    for tensor in frozen:
        tensor.requires_grad_(False)
    sum(y.sum() for y in adapted_linears(x, parts)).backward()  # type: ignore[union-attr]
    assert all(t.grad is None for t in frozen)
    assert all(t.grad is not None for t in (*parts[0].B, *parts[1].A))


def test_a_frozen_a_lets_go_of_the_input() -> None:
    x, parts = make(2, 1, 9, ())
    for part in parts:
        part.A[0].requires_grad_(False)
    shapes: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t
    ):
        ys = adapted_linears(x, parts)
    assert tuple(x.shape) not in shapes
    check(ys, by_hand(x, parts), [x, *(part.B[0] for part in parts)])
    (grad,) = torch.autograd.grad(adapted_linears(x, parts)[0].sum(), x, create_graph=False)
    assert grad.shape == x.shape
    with pytest.raises(RuntimeError, match="let A take gradients"):
        torch.autograd.grad(adapted_linears(x, parts)[0].sum(), x, create_graph=True)


def test_float32_factors_in_half_precision_get_float32_gradients() -> None:
    x, parts = make(2, 2, 1, (2,))
    cast = lambda t, dtype: t.detach().to(dtype).requires_grad_()  # noqa: E731
    own = [
        Part(
            part.W.bfloat16(),
            None if part.bias is None else part.bias.bfloat16(),
            tuple(cast(A, torch.float32) for A in part.A),
            tuple(cast(B, torch.float32) for B in part.B),
            part.scale,
        )
        for part in parts
    ]
    ys = adapted_linears(x.detach().bfloat16(), own)
    sum(y.float().sum() for y in ys).backward()  # type: ignore[union-attr]
    for part in own:
        for factor in (*part.A, *part.B):
            assert factor.grad is not None and factor.grad.dtype == torch.float32


def test_torch_func_maps_over_inputs() -> None:
    x, parts = make(2, 1, 3, ())
    per_row = torch.func.vmap(lambda row: tuple(y[0] for y in adapted_linears(row[None], parts)))
    for one, two in zip(per_row(x), by_hand(x, parts), strict=True):
        torch.testing.assert_close(one, two)


class Compiled(nn.Module):
    """Layers whose factors are parameters."""

    def __init__(self, parts: list[Part], adapters: int) -> None:
        super().__init__()
        self.parts, self.adapters = parts, adapters
        self.factors = nn.ParameterList(t for part in parts for t in (*part.A, *part.B))

    def forward(self, x: Tensor) -> Tensor:
        """A sum in which each layer's output has a weight of its own."""
        n, own = self.adapters, []
        for i, part in enumerate(self.parts):
            factors = [self.factors[2 * n * i + j] for j in range(2 * n)]
            own.append(part._replace(A=tuple(factors[:n]), B=tuple(factors[n:])))
        ys = adapted_linears(x, own)
        return torch.stack([(y * (i + 1)).pow(2).sum() for i, y in enumerate(ys)]).sum()


@pytest.mark.parametrize(("layers", "adapters"), [(1, 1), (3, 1), (2, 2)])
def test_compiled_without_a_break_they_give_the_same_gradients(layers: int, adapters: int) -> None:
    x, parts = make(layers, adapters, 2, (3,))
    model = Compiled(parts, adapters)
    wanted = torch.autograd.grad(model(x), [x, *model.factors])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(x), [x, *model.factors])
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two)
