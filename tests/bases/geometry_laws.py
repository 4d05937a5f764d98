"""What holds for every geometry, asked of a layer, an input and a rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from multigraft.bases import Geometry, geometry_of


def seeded(*shape: int, seed: int = 3) -> Tensor:
    """Float64 noise."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def geometry(layer: nn.Module) -> Geometry:
    """The layer's geometry, which it must have."""
    found = geometry_of(layer)
    assert found is not None
    return found


def factors(layer: nn.Module, rank: int) -> tuple[Tensor, Tensor]:
    """A low-rank pair for this layer."""
    a, b = geometry(layer).factor_shapes(layer, rank)
    return seeded(*a, seed=4), seeded(*b, seed=5)


def with_weight(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """The layer's own forward with another weight."""
    return functional_call(layer, {"weight": weight}, (x,))


def assert_update_is_a_change_of_the_weight(layer: nn.Module, x: Tensor, rank: int = 2) -> None:
    """``y + s·lift(project(x))`` is the layer with ``W + s·product``, by every way to say it."""
    shape, (A, B) = geometry(layer), factors(layer, rank)
    expected = with_weight(layer, x, layer.weight + 0.7 * shape.product(layer, A, B))
    y = layer(x)
    update = shape.lift(layer, shape.project(layer, x, A), B)
    torch.testing.assert_close(y + 0.7 * update, expected)
    torch.testing.assert_close(shape.add_low_rank(layer, y, x, A, B, 0.7), expected)
    torch.testing.assert_close(
        shape.add_product(layer, layer.weight.detach(), A, B, 0.7),
        layer.weight + 0.7 * shape.product(layer, A, B),
    )


def assert_runs_as_the_layer(layer: nn.Module, x: Tensor) -> None:
    """`run` is the layer's forward without its bias."""
    other = torch.randn_like(layer.weight)
    bias = {} if getattr(layer, "bias", None) is None else {"bias": torch.zeros_like(layer.bias)}
    expected = functional_call(layer, {"weight": other, **bias}, (x,))
    torch.testing.assert_close(geometry(layer).run(layer, x, other), expected)


def assert_matrix_and_back(layer: nn.Module, rank: int = 2) -> None:
    """`as_matrix` has ``out`` rows, and `from_matrix` undoes it."""
    shape = geometry(layer)
    M = shape.as_matrix(layer, layer.weight)
    assert M.shape[0] == shape.sizes(layer)[1]
    assert torch.equal(shape.from_matrix(layer, M), layer.weight)


def assert_gradients(layer: nn.Module, x: Tensor, rank: int = 2) -> None:
    """Every differentiable argument of the low-rank path has the function's own gradient."""
    shape, (A, B) = geometry(layer), factors(layer, rank)
    y = layer(x).detach().requires_grad_()
    given = [y, A.requires_grad_(), B.requires_grad_()]
    if x.is_floating_point():
        given.append(x.clone().requires_grad_())

    def path(y: Tensor, A: Tensor, B: Tensor, seen: Tensor = x) -> Tensor:
        return shape.add_low_rank(layer, y, seen, A, B, 0.7)

    assert torch.autograd.gradcheck(path, given)
    assert torch.autograd.gradcheck(lambda A, B: shape.product(layer, A, B), given[1:3])


def assert_maps_fold(layer: nn.Module, x: Tensor, features: int, groups: int = 1) -> None:
    """Linear maps of the input's channels and of the output's features fold into the weight.

    Args:
        features: the axis of ``x`` that runs over the layer's input.
        groups: channels are mixed within each of these only: a grouped kernel holds no more.
    """
    shape = geometry(layer)
    in_, out = shape.sizes(layer)
    P = torch.block_diag(*seeded(groups, in_ // groups, in_ // groups, seed=6))
    Q = seeded(out, out, seed=7) if groups == 1 else seeded(out, seed=7).diag()
    W, axis = layer.weight.detach(), shape.feature_axis(layer)
    y = shape.run(layer, x, W)
    folded = shape.fold_input(layer, W, lambda x: _along(x, P, features))
    expected = shape.run(layer, _along(x, P, features), W)
    torch.testing.assert_close(shape.run(layer, x, folded), expected)
    folded = shape.fold_output(layer, W, lambda y: _along(y, Q, axis))
    torch.testing.assert_close(shape.run(layer, x, folded), _along(y, Q, axis))


def _along(t: Tensor, M: Tensor, axis: int) -> Tensor:
    """``M`` applied along one axis."""
    return (t.movedim(axis, -1) @ M.T).movedim(-1, axis)
