"""Base models that are quantised as they are loaded."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from multigraft import ConfigError, MissingExtraError
from multigraft.storage import storage_of
from multigraft.train import load_model


def quantised(model: nn.Module) -> set[str]:
    return {storage_of(m).name for m in model.modules() if "Linear" in type(m).__name__}


@pytest.mark.parametrize(
    ("quantize", "storage", "kind"), [("nf4", "bnb4", "nf4"), ("fp4", "bnb4", "fp4")]
)
def test_linear_layers_are_packed_and_the_head_stays_as_it_is(base_dir, quantize, storage, kind):
    model = load_model(base_dir, quantize=quantize)
    layer = model.model.layers[0].self_attn.q_proj
    assert quantised(model) == {storage, "dense"}
    assert layer.weight.quant_state.quant_type == kind
    assert layer.weight.quant_state.nested
    assert layer.compute_dtype is torch.float32
    assert type(model.lm_head) is nn.Linear
    assert not model.training


def test_eight_bits_are_served_too(base_dir):
    assert quantised(load_model(base_dir, quantize="int8")) == {"bnb8", "dense"}


def test_loading_twice_gives_the_same_bits(base_dir):
    first, second = (load_model(base_dir, quantize="nf4").state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_an_unknown_format_is_refused_with_the_nearest_one(base_dir):
    with pytest.raises(ConfigError, match=r"`quantize` \(='nf5'\) must be one of nf4, .*`nf4`"):
        load_model(base_dir, quantize="nf5")


def test_without_bitsandbytes_the_extra_is_named(base_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match=r"multigraft\[quant\]"):
        load_model(base_dir, quantize="nf4")
