"""Layers with a forward of their own: adapted in any storage, merged in a registered one alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from bitsandbytes.nn import Linear4bit, LinearNF4
from torch import Tensor, nn

from multigraft import LoraConfig, PeftModel, UnsupportedError, get_peft_model
from multigraft.storage import DENSE, STORAGES, storage_of
from tests.laws import fingerprint
from tests.storage.cases import CASES


class Doubled(nn.Linear):
    """A linear layer that does something else with its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Doubled4bit(Linear4bit):
    """The same over packed weights."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def doubled(kind: str) -> nn.Module:
    if kind == "bnb-nf4":
        return Doubled4bit(64, 64, quant_type="nf4").to("cpu")
    return CASES[kind].build(Doubled(64, 64))


def adapted(layer: nn.Module) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    return get_peft_model(nn.Sequential(layer).train(), config)


KINDS = ["float32", "float8", "bnb-nf4", "torchao-int8", "weight-norm", "weight-norm-hook"]


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_adapted_and_not_merged(kind):
    model, x = adapted(doubled(kind)), torch.randn(3, 64)
    layer = model.get_base_model()[0]
    own = layer.base_layer(x)
    apart, before = model(x), fingerprint(model)
    assert not torch.allclose(apart, own)
    with pytest.raises(UnsupportedError, match=r"Doubled.*` overrides `forward`.*STORAGES"):
        model.merge_adapter()
    assert fingerprint(model) == before
    assert torch.equal(model(x), apart)


@pytest.mark.parametrize("kind", KINDS)
def test_its_weight_is_read_as_it_is_stored(kind):
    layer = doubled(kind).eval()
    storage, x = storage_of(layer), torch.randn(3, 64)
    assert storage.name == "foreign"
    assert storage.shape(layer) == (64, 64)
    expected = 2 * nn.functional.linear(x, storage.read(layer), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=0.01, atol=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_its_bias_is_not_written_either(kind):
    layer = doubled(kind)
    assert "overrides `forward`" in storage_of(layer, "bias").refusal(layer, "bias")


@pytest.mark.parametrize("kind", [kind for kind in CASES if CASES[kind].merges])
def test_layers_of_torch_and_of_the_quantisers_are_understood(kind):
    layer = CASES[kind].make(64, 64)
    assert storage_of(layer).name != "foreign"
    assert storage_of(layer).refusal(layer) is None


def test_subclasses_that_keep_the_forward_are_understood():
    class Kept(nn.Linear):
        """Adds nothing to the forward."""

    assert storage_of(Kept(8, 8)) is DENSE
    assert storage_of(LinearNF4(64, 64).to("cpu")).name == "bnb4"


def registered(cls: type) -> Callable[[], None]:
    class Halved(type(storage_of(nn.Linear(2, 2)))):
        """The weight counts twice, so half of the change is written."""

        def read(self, layer: nn.Module, name: str = "weight") -> Tensor:
            return 2 * super().read(layer, name)

        def write(self, layer: nn.Module, value: Tensor, name: str = "weight") -> None:
            super().write(layer, value / 2, name)

        def read_kept(self, layer: nn.Module, kept: Tensor, name: str = "weight") -> Tensor:
            return 2 * super().read_kept(layer, kept, name)

    STORAGES.register(cls)(Halved())
    return lambda: STORAGES.unregister(cls)


def test_a_storage_registered_for_the_class_merges_it():
    forget = registered(Doubled)
    try:
        model, x = adapted(Doubled(64, 64, bias=False)), torch.randn(3, 64)
        apart, before = model(x), fingerprint(model)
        model.merge_adapter()
        torch.testing.assert_close(model(x), apart)
        model.unmerge_adapter()
        assert fingerprint(model) == before
    finally:
        forget()


def test_a_registered_subclass_of_a_quantisers_layer_is_merged_by_the_storage_that_is_named():
    STORAGES.register(Doubled4bit)(storage_of(CASES["bnb-nf4"].make(64, 64)))
    try:
        assert storage_of(doubled("bnb-nf4")).name == "bnb4"
    finally:
        STORAGES.unregister(Doubled4bit)
    assert storage_of(doubled("bnb-nf4")).name == "foreign"
