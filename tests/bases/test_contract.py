"""The contract of geometries: what a new kind gets for nothing, and how layers find theirs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from multigraft.bases import GEOMETRIES, Geometry, geometry_of


class Sum(nn.Module):
    """A new kind: its output is one number, the weighted sum of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class Summing(Geometry):
    """No more than a kind must say."""

    name = "sum"

    def sizes(self, layer: nn.Module) -> tuple[int, int]:
        return 4, 1

    def project(self, layer: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        return x @ A.T

    def lift(self, layer: nn.Module, h: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
        return h @ B.T


@pytest.fixture
def registered() -> object:
    GEOMETRIES.register(Sum)(Summing())
    yield
    GEOMETRIES.unregister(Sum)


def test_a_layer_of_no_known_kind_has_no_geometry() -> None:
    assert geometry_of(Sum()) is None
    assert geometry_of(nn.ReLU()) is None


@pytest.mark.usefixtures("registered")
def test_a_registered_kind_serves_its_subclasses_and_understands_its_own_forward() -> None:
    class Half(Sum):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 2

    geometry = geometry_of(Half())
    assert isinstance(geometry, Summing)
    assert geometry.understands(Sum())
    assert not geometry.understands(Half())


@pytest.mark.usefixtures("registered")
def test_the_low_rank_path_and_the_product_follow_from_shrink_and_expand() -> None:
    layer, geometry = Sum(), Summing()
    a, b = geometry.factor_shapes(layer, 2)
    A, B, x = torch.randn(a), torch.randn(b), torch.randn(3, 4)
    expected = layer(x) + 0.5 * x @ (B @ A).T
    torch.testing.assert_close(geometry.add_low_rank(layer, layer(x), x, A, B, 0.5), expected)


def test_the_low_rank_path_keeps_the_dtype_of_what_is_added_to() -> None:
    layer, geometry = Sum(), Summing()
    y = torch.zeros(3, 1, dtype=torch.bfloat16)
    A, B = torch.randn(2, 4), torch.randn(1, 2)
    assert geometry.add_low_rank(layer, y, torch.randn(3, 4), A, B, 0.5).dtype == torch.bfloat16


def test_what_a_kind_must_say_and_does_not_is_named() -> None:
    class Silent(Geometry):
        name = "silent"

    for call in (
        lambda g: g.sizes(nn.ReLU()),
        lambda g: g.project(nn.ReLU(), torch.ones(1), torch.ones(1)),
        lambda g: g.product(nn.ReLU(), torch.ones(1), torch.ones(1)),
    ):
        with pytest.raises(NotImplementedError, match="Silent must define"):
            call(Silent())
