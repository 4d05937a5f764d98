"""Convolutions of one, two and three dimensions, with every option of their kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from multigraft.errors import UnsupportedError
from tests.bases import geometry_laws as laws
from tests.bases.geometry_laws import factors, geometry, seeded

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "strided": {"stride": 2, "padding": 1},
    "dilated": {"dilation": 2, "bias": False},
    "padded to the same size": {"padding": "same"},
    "reflecting": {"padding": 1, "padding_mode": "reflect"},
    "circular": {"padding": 1, "padding_mode": "circular"},
}
KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def build(dims: int, in_: int = 4, out: int = 6, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    if dims == 3 and options.get("padding_mode") == "reflect":
        options["padding_mode"] = "replicate"  # torch reflects no volumes of float64 on old CPUs
    kernel = (3, 2, 2)[:dims]
    return KINDS[dims](in_, out, kernel, **options).double().requires_grad_(False)


def pixels(dims: int, channels: int = 4) -> torch.Tensor:
    return seeded(2, channels, *(7, 6, 5)[:dims])


every_dimension = pytest.mark.parametrize("dims", [1, 2, 3])
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@every_dimension
@every_option
def test_an_update_is_a_change_of_the_kernel(dims: int, options: dict[str, Any]) -> None:
    laws.assert_update_is_a_change_of_the_weight(build(dims, **options), pixels(dims))


@every_dimension
@every_option
def test_run_is_the_forward_without_the_bias(dims: int, options: dict[str, Any]) -> None:
    laws.assert_runs_as_the_layer(build(dims, **options), pixels(dims))


@every_dimension
def test_a_picture_without_a_batch_is_taken_as_well(dims: int) -> None:
    laws.assert_update_is_a_change_of_the_weight(build(dims), pixels(dims)[0])


@every_dimension
def test_the_matrix_has_a_row_per_output_channel(dims: int) -> None:
    laws.assert_matrix_and_back(build(dims))


@every_dimension
@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_are_the_functions_own(dims: int, groups: int) -> None:
    layer = build(dims, in_=2, out=2, groups=groups, stride=2)
    shape, (A, B) = geometry(layer), factors(layer, 2)
    x, y = pixels(dims, 2), layer(pixels(dims, 2))
    given = [t.detach().requires_grad_() for t in (y, x, A, B)]
    assert torch.autograd.gradcheck(
        lambda y, x, A, B: shape.add_low_rank(layer, y, x, A, B, 0.7), given
    )


@every_dimension
@pytest.mark.parametrize("groups", [1, 2])
def test_maps_of_channels_fold_into_the_kernel(dims: int, groups: int) -> None:
    layer = build(dims, groups=groups, stride=2)
    laws.assert_maps_fold(layer, pixels(dims), features=1, groups=groups)


@every_dimension
def test_factors_of_a_grouped_convolution_have_pefts_shapes(dims: int) -> None:
    layer = build(dims, groups=2)
    kernel, ones = tuple(layer.kernel_size), (1,) * dims
    assert geometry(layer).factor_shapes(layer, 4) == ((4, 4, *kernel), (6, 2, *ones))


def test_the_update_of_a_grouped_convolution_mixes_all_channels_and_expands_by_group() -> None:
    layer, x = build(1, groups=2), pixels(1)
    shape, (A, B) = geometry(layer), factors(layer, 4)
    h = F.conv1d(x, A)
    halves = [F.conv1d(part, b) for part, b in zip(h.chunk(2, 1), B.chunk(2), strict=True)]
    found = shape.lift(layer, shape.project(layer, x, A), B)
    torch.testing.assert_close(found, torch.cat(halves, 1))


def test_a_rank_that_the_groups_do_not_divide_is_refused_by_number() -> None:
    layer = build(2, groups=2)
    assert geometry(layer).check_rank(layer, 4) is None
    reason = geometry(layer).check_rank(layer, 3)
    assert reason is not None
    assert "(=3)" in reason and "(=2)" in reason


def test_a_grouped_convolution_has_no_product() -> None:
    layer = build(2, groups=2)
    with pytest.raises(UnsupportedError, match=r"`groups` \(=2\)"):
        geometry(layer).product(layer, *factors(layer, 4))


@every_dimension
def test_a_convolution_is_not_linear_and_its_features_are_channels(dims: int) -> None:
    layer = build(dims)
    assert not geometry(layer).is_linear
    assert layer(pixels(dims)).shape[geometry(layer).feature_axis(layer)] == 6
