"""What scripts and other packages read from an adapted layer, under PEFT's names."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from multigraft import AdapterNameError, StateError, get_peft_model
from tests import oracle
from tests.oracle import KINDS, graft_pair
from tests.subject import Subject, layers


@pytest.fixture
def model() -> Any:
    """`a` (rank 2) and `b` (rank 4) on the head; both are active."""
    subject = Subject()
    model = get_peft_model(subject.base, subject.config(["head"], lora_alpha=6), "a")
    model.add_adapter("b", subject.config(["head"], r=4, lora_alpha=6, use_rslora=True))
    model.base_model.set_adapter(["a", "b"])
    return model


def head(model: Any) -> Any:
    (layer,) = layers(model.get_base_model())
    return layer


def test_every_layer_answers_pefts_attributes_as_peft_does() -> None:
    options = {"target_modules": KINDS, "r": 4, "lora_alpha": 6, "lora_dropout": 0.5}
    pair = graft_pair(oracle.Net, options, fill=False)
    oracle.add_to_both(pair, "b", {"target_modules": ["lin0"], "r": 2, "use_rslora": True})
    theirs = dict(pair.theirs.base_model.model.named_modules())
    for layer in layers(pair.ours.get_base_model()):
        other = theirs[layer.path]
        for name in ("r", "lora_alpha", "scaling"):
            assert dict(getattr(layer, name)) == getattr(other, name), (layer.path, name)
        for name in ("merged", "merged_adapters", "disable_adapters"):
            assert getattr(layer, name) == getattr(other, name), (layer.path, name)
        for name in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
            ours = getattr(layer, name)
            assert list(ours.keys()) == list(getattr(other, name).keys()), (layer.path, name)
        assert torch.equal(layer.get_base_layer().weight, other.get_base_layer().weight)


def test_what_a_parent_reads_of_its_layer_is_the_base_layers(model: Any) -> None:
    layer = head(model)
    assert (layer.in_features, layer.out_features) == (16, 5)
    assert layer.weight is layer.base_layer.weight
    assert layer.bias is layer.base_layer.bias
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = layer.no_such_thing


def test_what_a_parent_reads_of_a_saved_module_is_the_active_copys() -> None:
    subject = Subject()
    model = get_peft_model(subject.base, subject.config(["up"], modules_to_save=["head"]))
    layer = model.get_base_model().head
    copy = layer.modules_to_save["default"]
    assert layer.weight is copy.weight
    assert layer.original_module is layer.base_layer
    with model.disable_adapter():
        assert layer.weight is layer.base_layer.weight


def test_scalings_are_read_from_and_written_to_the_adapters(model: Any) -> None:
    layer = head(model)
    x = torch.ones(1, 16, dtype=torch.float64)
    model.set_adapter("a")
    update = layer(x) - layer.base_layer(x)
    assert dict(layer.scaling) == {"a": 3.0, "b": 3.0}
    layer.scaling["a"] = 1.5
    torch.testing.assert_close(layer(x) - layer.base_layer(x), update / 2)
    assert (len(layer.scaling), list(layer.scaling)) == (2, ["a", "b"])
    assert repr(layer.scaling) == "{'a': 1.5, 'b': 3.0}"


def test_a_scale_is_relative_to_the_configs_whatever_was_set_before(model: Any) -> None:
    layer = head(model)
    layer.scaling["a"] = 100.0
    layer.set_scale("a", 2)
    assert layer.scaling["a"] == 2 * 6 / 2
    layer.set_scale("b", 2)
    assert layer.scaling["b"] == 2 * 6 / 4**0.5


def test_scaling_a_layer_scales_its_active_adapters_and_unscaling_undoes_it(model: Any) -> None:
    layer = head(model)
    model.set_adapter("b")
    layer.scale_layer(4.0)
    assert dict(layer.scaling) == {"a": 3.0, "b": 12.0}
    layer.unscale_layer(2.0)
    assert dict(layer.scaling) == {"a": 3.0, "b": 6.0}
    layer.unscale_layer()
    assert dict(layer.scaling) == {"a": 3.0, "b": 3.0}


def test_unscaling_by_zero_changes_nothing(model: Any) -> None:
    with pytest.raises(StateError, match=r"head: `scale` \(=0\)"):
        head(model).unscale_layer(0)
    assert dict(head(model).scaling) == {"a": 3.0, "b": 3.0}


def test_a_merged_adapters_scaling_is_fixed_and_stops_a_rescaling_of_both(model: Any) -> None:
    model.base_model.merge_adapter(["b"])
    layer = head(model)
    for change in (lambda: layer.scale_layer(2.0), lambda: layer.set_scale("b", 2.0)):
        with pytest.raises(StateError, match="scaling of `b` cannot change while it is merged"):
            change()
    assert dict(layer.scaling) == {"a": 3.0, "b": 3.0}


def test_scalings_are_not_the_place_to_delete_or_to_make_adapters(model: Any) -> None:
    with pytest.raises(AdapterNameError, match="delete_adapter"):
        del head(model).scaling["a"]
    with pytest.raises((AdapterNameError, KeyError), match="c"):
        head(model).scaling["c"] = 1.0


def test_a_layer_says_who_is_active_merged_and_disabled(model: Any) -> None:
    layer = head(model)
    assert (layer.active_adapters, layer.active_adapter) == (["a", "b"], ["a", "b"])
    model.set_adapter("a")
    assert layer.active_adapter == ["a"]
    model.base_model.merge_adapter()
    assert (layer.merged, layer.merged_adapters) == (True, ["a"])
    model.base_model.unmerge_adapter()
    model.base_model.disable_adapter_layers()
    assert (layer.merged, layer.disable_adapters) == (False, True)


def test_a_printed_layer_names_its_adapters(model: Any) -> None:
    assert repr(head(model)).startswith("AdaptedLayer(\n  adapters=['a', 'b'], merged=[]")
