"""Linear layers, and those that store their weight transposed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from multigraft.bases import geometry_of
from tests.bases import geometry_laws as laws
from tests.bases.geometry_laws import geometry, seeded


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    layer = Conv1D(3, 5) if kind == "Conv1D" else nn.Linear(5, 3, bias=kind == "Linear")
    return layer.double().requires_grad_(False)


@pytest.fixture(params=["Linear", "Linear without bias", "Conv1D"])
def layer(request: pytest.FixtureRequest) -> nn.Module:
    return build(request.param)


def test_sizes_and_factors_are_the_matrix_ones_however_it_is_stored(layer: nn.Module) -> None:
    assert geometry(layer).sizes(layer) == (5, 3)
    assert geometry(layer).factor_shapes(layer, 2) == ((2, 5), (3, 2))
    assert geometry(layer).factors == ("lora_A.weight", "lora_B.weight")


@pytest.mark.parametrize("lead", [(), (1,), (2, 4)], ids=str)
def test_an_update_is_a_change_of_the_weight(layer: nn.Module, lead: tuple[int, ...]) -> None:
    laws.assert_update_is_a_change_of_the_weight(layer, seeded(*lead, 5))


def test_run_is_the_forward_without_the_bias(layer: nn.Module) -> None:
    laws.assert_runs_as_the_layer(layer, seeded(2, 4, 5))


def test_the_matrix_has_a_row_per_output_feature(layer: nn.Module) -> None:
    laws.assert_matrix_and_back(layer)


def test_gradients_are_the_functions_own(layer: nn.Module) -> None:
    laws.assert_gradients(layer, seeded(2, 5))


def test_linear_maps_fold_into_the_weight(layer: nn.Module) -> None:
    laws.assert_maps_fold(layer, seeded(4, 5), features=-1)


def test_files_say_that_only_conv1d_is_stored_transposed() -> None:
    assert [geometry(build(k)).is_transposed for k in ("Linear", "Conv1D")] == [False, True]


def test_both_are_linear_for_all_linear(layer: nn.Module) -> None:
    assert geometry(layer).is_linear


def test_a_bias_of_the_update_is_added_once(layer: nn.Module) -> None:
    A, B = laws.factors(layer, 2)
    h = geometry(layer).project(layer, seeded(4, 5), A)
    b = seeded(3, seed=9)
    with_bias = geometry(layer).lift(layer, h, B, b)
    torch.testing.assert_close(with_bias, geometry(layer).lift(layer, h, B) + b)


class Renamed(nn.Linear):
    """A subclass with nothing of its own."""


class Doubled(nn.Linear):
    """A subclass whose forward means something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_subclasses_have_the_geometry_of_their_base() -> None:
    assert geometry_of(Renamed(2, 2)) is geometry_of(Doubled(2, 2)) is geometry_of(nn.Linear(2, 2))


def test_a_subclass_with_a_forward_of_its_own_is_not_understood() -> None:
    assert geometry(Renamed(2, 2)).understands(Renamed(2, 2))
    assert not geometry(Doubled(2, 2)).understands(Doubled(2, 2))
