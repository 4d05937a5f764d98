"""The example of docs/adding-a-layer.md passes the contract suite and the geometries' laws."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import multigraft
from multigraft import LoraConfig, TargetError, get_peft_model
from multigraft.bases import GEOMETRIES
from tests.bases import geometry_laws
from tests.contracts import pairs as suite
from tests.contracts.laws import (
    LAWS,
    Law,
    is_refused,
    is_supported,
    refusal_leaves_the_model_untouched,
)
from tests.contracts.pairs import GEOMETRY_CASES, ROWS, SIZE, GeometryCase, Pair
from tests.examples.test_extending import load

KINDS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYER = {
    "kernel_size": (3, 2),
    "stride": (2, 1),
    "padding": 1,
    "output_padding": (1, 0),
    "dilation": 1,
}

pytestmark = pytest.mark.filterwarnings("ignore")


@contextmanager
def registered() -> Iterator[None]:
    """The example and a case of it, for the length of the block."""
    load("conv_transpose")
    GEOMETRY_CASES["conv_transpose"] = GeometryCase(
        lambda: nn.ConvTranspose2d(SIZE, 32, **LAYER), lambda: torch.randn(ROWS, SIZE, 4, 3)
    )
    try:
        yield
    finally:
        del GEOMETRY_CASES["conv_transpose"]
        for kind in KINDS:
            GEOMETRIES.unregister(kind)


@pytest.fixture(scope="module", autouse=True)
def example() -> Iterator[None]:
    """The example at work."""
    with registered():
        yield


PAIRS = [Pair(method, "conv_transpose", "float32", options) for method, options in suite.rows()]
LAYERS: dict[str, tuple[nn.Module, Any]] = {
    "1d": (nn.ConvTranspose1d(4, 6, 3, stride=2, dilation=2), (2, 4, 5)),
    "2d": (nn.ConvTranspose2d(4, 6, **LAYER), (2, 4, 5, 3)),
    "3d": (nn.ConvTranspose3d(4, 6, 2, bias=False), (2, 4, 2, 3, 2)),
}


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_law(law: Law, pair: Pair) -> None:
    if is_refused(pair):
        refusal_leaves_the_model_untouched(pair)
    elif is_supported(pair) and law.applies(pair):
        law(pair)


def test_every_method_that_acts_on_convolutions_acts_on_it() -> None:
    plain = [pair for pair in PAIRS if not pair.options.keys() & {"init_lora_weights", "r"}]
    acting = {pair.method for pair in plain if not is_refused(pair) and is_supported(pair)}
    assert acting >= {"LORA", "HIRA", "IA3", "OFT", "ADALORA", "BIAS", "SAVED_MODULE"}


@pytest.mark.parametrize("dimensions", LAYERS)
def test_it_keeps_the_laws_of_geometries(dimensions: str) -> None:
    layer, shape = LAYERS[dimensions]
    layer, x = layer.double(), geometry_laws.seeded(*shape)
    geometry_laws.assert_update_is_a_change_of_the_weight(layer, x)
    geometry_laws.assert_runs_as_the_layer(layer, x)
    geometry_laws.assert_matrix_and_back(layer)
    geometry_laws.assert_gradients(layer, x)
    geometry_laws.assert_maps_fold(layer, x, features=1)


def test_adapters_of_it_are_combined_and_extracted() -> None:
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.ConvTranspose2d(4, 6, 3)).eval(), torch.randn(2, 4, 5, 5)
    config = LoraConfig(target_modules=["0"], r=2, init_lora_weights=False)
    model = get_peft_model(base, config, "a").eval()
    before = model(x)
    model.add_weighted_adapter(["a"], [1.0], "again", "svd")
    model.set_adapter("again")
    torch.testing.assert_close(model(x), before)
    pair, _ = multigraft.convert_to_lora(model, 2, adapter_name="a")
    assert pair.r == 2


def test_groups_are_refused_for_every_method_before_anything_is_changed() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2))
    with pytest.raises(TargetError, match=r"`groups` \(=2\) are more than 1"):
        get_peft_model(model, LoraConfig(target_modules=["0"], r=2))
    assert type(model[0]) is nn.ConvTranspose2d
