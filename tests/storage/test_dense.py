"""Plain tensors: narrow dtypes, one rounding, what is not plain after all."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from multigraft import LoraConfig, PeftModel, UnsupportedError, get_peft_model
from multigraft.storage import DENSE, storage_of
from tests.laws import fingerprint
from tests.storage.cases import CASES


def adapted(layer: nn.Module, scale: float = 1.0) -> PeftModel:
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(layer), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(scale)
    return model


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.float16, 65504), (torch.float8_e4m3fn, 448), (torch.float8_e5m2, 57344)],
)
def test_what_a_narrow_dtype_cannot_hold_is_refused_before_anything_is_written(dtype, limit):
    layer = nn.Linear(8, 8, bias=False)
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    before = layer.weight.detach().clone()
    DENSE.write(layer, torch.full((8, 8), float(limit)))
    assert torch.equal(layer.weight.float(), torch.full((8, 8), float(limit)))
    DENSE.give_back(layer, before)
    with pytest.raises(ValueError, match=rf"would hold .* ends at {limit:.3g}".replace("+", r"\+")):
        DENSE.write(layer, torch.full((8, 8), 2.0 * limit))
    assert torch.equal(layer.weight.float(), before.float())


def test_a_merge_that_overflows_float16_leaves_the_model_as_it_was():
    model = adapted(nn.Linear(8, 8).half(), scale=400.0)
    before = fingerprint(model)
    with pytest.raises(ValueError, match="convert the base to bfloat16 or float32 first"):
        model.merge_adapter()
    assert fingerprint(model) == before


def test_eight_bit_floats_read_as_float32_and_adapters_take_float32():
    layer = CASES["float8"].make(64, 32)
    assert layer.weight.dtype is torch.float8_e4m3fn
    assert storage_of(layer).read(layer).dtype is torch.float32
    found = {p.dtype for p in adapted(layer).parameters() if p.requires_grad}
    assert found == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_merge_rounds_once_from_the_exact_sum(dtype):
    layer = nn.Linear(64, 64).to(dtype)
    model = adapted(layer)
    wrapper = model.get_base_model()[0]
    A, B = wrapper.lora_A["default"].weight.double(), wrapper.lora_B["default"].weight.double()
    wanted = (layer.weight.double() + wrapper.scaling["default"] * B @ A).to(dtype)
    model.merge_adapter()
    off = (layer.weight.double() - wanted.double()).abs() / wanted.double().abs().clamp(min=1e-3)
    assert float(off.max()) <= torch.finfo(dtype).eps
    # Float32 sums may fall on the other side of a tie; more than a few would be a second rounding.
    assert float((layer.weight != wanted).double().mean()) < 0.005


def test_a_pruned_weight_is_refused_since_the_hook_would_overwrite_it():
    layer = prune.random_unstructured(nn.Linear(8, 8), "weight", 0.5)
    model = adapted(layer)
    with pytest.raises(UnsupportedError, match="not a plain parameter but computed from others"):
        model.merge_adapter()


def test_a_weight_on_the_meta_device_is_refused():
    layer = nn.Linear(8, 8, device="meta")
    assert "meta device: it holds no values" in storage_of(layer).refusal(layer)


def test_an_integer_weight_is_refused():
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int32), requires_grad=False)
    assert "not a floating-point tensor" in storage_of(layer).refusal(layer)


def test_a_bias_is_plain_whatever_the_weights_format():
    for name in ("bnb-nf4", "bnb-int8", "torchao-int8", "weight-norm", "weight-norm-hook"):
        layer = CASES[name].make(64, 64)
        assert storage_of(layer) is not DENSE, name
        assert storage_of(layer, "bias") is DENSE, name
