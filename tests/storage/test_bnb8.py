"""8-bit weights of bitsandbytes: row scales before and after a forward, saved, refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear8bitLt
from torch import Tensor, nn

from multigraft import LoraConfig, MultigraftWarning, PeftModel, UnsupportedError, get_peft_model
from multigraft.storage import storage_of
from tests.laws import bits_of
from tests.storage.cases import CASES

CASE = CASES["bnb-int8"]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "merged into quantised", MultigraftWarning)
        yield


def adapted(layer: nn.Module, **options: object) -> PeftModel:
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, **options)
    return get_peft_model(nn.Sequential(layer), config)


def rows() -> Tensor:
    return torch.randn(3, 64, generator=torch.Generator().manual_seed(3))


def packed(layer: nn.Module) -> list[bytes]:
    """Bits of the data and of the row scales, wherever these lie now."""
    scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    return [bits_of(layer.weight), bits_of(scales)]


def test_quantising_again_is_bitsandbytes_own_up_to_its_detour_through_float16():
    layer, wanted = CASE.make(64, 64), 0.1 * torch.randn(64, 64)
    storage_of(layer).write(layer, wanted)
    data, scales, _ = functional.int8_vectorwise_quant(wanted.half())
    assert float((layer.weight.SCB - scales).abs().max()) <= 2**-11 * float(scales.max())
    assert int((layer.weight.data.int() - data.int()).abs().max()) <= 1


@pytest.mark.parametrize("mode", ["before a forward", "after training", "after evaluation"])
def test_data_and_row_scales_come_back_exactly(mode):
    layer = CASE.make(64, 64)
    model = adapted(layer).train(mode == "after training")
    if mode != "before a forward":
        model(rows())
        assert layer.weight.SCB is None
    before, y = packed(layer), model(rows())
    model.merge_adapter()
    assert packed(layer) != before
    model(rows())
    model.unmerge_adapter()
    assert packed(layer) == before
    assert torch.equal(model(rows()), y)


def test_the_layers_state_and_its_weight_stay_one_memory():
    layer = CASE.make(64, 64)
    model = adapted(layer)
    model(rows())
    for change in (model.merge_adapter, model.unmerge_adapter):
        change()
        assert layer.state.CB.data_ptr() == layer.weight.data_ptr()


def test_merging_a_copy_leaves_the_original_alone():
    layer = CASE.make(64, 64)
    model = adapted(layer)
    model(rows())
    twin, before = copy.deepcopy(model), packed(layer)
    twin.merge_adapter()
    assert packed(layer) == before
    assert packed(twin.get_base_model()[0].base_layer) != before


def test_a_row_of_zeros_stays_one():
    layer, wanted = CASE.make(64, 64), torch.randn(64, 64)
    wanted[5] = 0
    storage_of(layer).write(layer, wanted)
    read = storage_of(layer).read(layer)
    assert torch.equal(read[5], torch.zeros(64))
    assert torch.isfinite(layer(rows())).all()


def test_a_bias_is_merged_with_its_scale_in_full_precision():
    layer = CASE.make(64, 64)
    model = adapted(layer, lora_bias=True, lora_alpha=32)
    with torch.no_grad():
        model.get_base_model()[0].lora_B["default"].bias.fill_(2.0)
    bias = layer.bias.clone()
    model.merge_adapter()
    assert torch.equal(layer.bias, bias + 16.0)
    model.unmerge_adapter()
    assert torch.equal(layer.bias, bias)


def test_a_merged_base_is_saved_and_loaded_by_bitsandbytes():
    model = adapted(CASE.make(64, 64)).eval()
    model(rows())
    merged = model.merge_and_unload()
    fresh = nn.Sequential(CASE.make(64, 64, seed=9)).eval()
    fresh.load_state_dict(merged.state_dict())
    assert torch.equal(fresh(rows()), merged(rows()))


def test_a_weight_that_each_forward_quantises_anew_is_refused():
    layer = Linear8bitLt(64, 64, has_fp16_weights=True)
    reason = storage_of(layer).refusal(layer)
    assert reason is not None
    assert "has_fp16_weights=False" in reason
    assert torch.equal(storage_of(layer).read(layer), layer.weight.detach())


def test_a_weight_that_is_not_quantised_yet_is_refused():
    model = adapted(Linear8bitLt(64, 64, has_fp16_weights=False))
    with pytest.raises(UnsupportedError, match="not quantised yet"):
        model.merge_adapter()
    model.to("cpu")
    model.merge_adapter()


def test_outlier_columns_do_not_matter_to_a_merge():
    layer = Linear8bitLt(64, 64, has_fp16_weights=False, threshold=2.0).to("cpu")
    model = adapted(layer).eval()
    x = rows()
    x[:, 3] = 5.0
    apart = model(x)
    model.merge_adapter()
    merged = model(x)
    assert float((merged - apart).norm() / apart.norm()) < 0.02
