"""torchao's tensor subclasses: every layout that can be quantised again, and one that cannot."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torchao import quantization
from torchao.quantization import MappingType, PerGroup, quantize_

from multigraft import LoraConfig, MultigraftWarning, PeftModel, UnsupportedError, get_peft_model
from multigraft.storage import storage_of
from tests.laws import bits_of, fingerprint

LAYOUTS = {
    "int8 by row": (quantization.Int8WeightOnlyConfig(), 0.01),
    "int8 by group": (quantization.Int8WeightOnlyConfig(granularity=PerGroup(32)), 0.01),
    "int8, input too": (quantization.Int8DynamicActivationInt8WeightConfig(), 0.01),
    "float8": (quantization.Float8WeightOnlyConfig(), 0.04),
    "int4 by group": (
        quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
        0.11,
    ),
    "int4, asymmetric": (
        quantization.IntxWeightOnlyConfig(
            weight_dtype=torch.int4,
            mapping_type=MappingType.ASYMMETRIC,
            granularity=PerGroup(32),
        ),
        0.11,
    ),
    "intx, input too": (quantization.Int8DynamicActivationIntxWeightConfig(), 0.01),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "merged into quantised", MultigraftWarning)
        yield


def quantised(name: str, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64, dtype=dtype))
    quantize_(net, LAYOUTS[name][0])
    return net.eval()


def adapted(net: nn.Module) -> PeftModel:
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    return get_peft_model(net, config)


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 64, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_written_is_what_torchao_itself_would_have_quantised(name):
    net, wanted = quantised(name), torch.randn(64, 64)
    storage_of(net[0]).write(net[0], wanted)
    other = nn.Sequential(nn.Linear(64, 64))
    other[0].weight.data.copy_(wanted)
    quantize_(other, LAYOUTS[name][0])
    assert bits_of(net[0].weight) == bits_of(other[0].weight)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_and_unmerging_keep_the_object_its_layout_and_its_bits(name, dtype):
    net, x = quantised(name, dtype), rows(dtype)
    weight = net[0].weight
    layout = repr(weight.__tensor_flatten__())
    model = adapted(net)
    before, apart = fingerprint(net), model(x)
    model.merge_adapter()
    assert float((model(x) - apart).norm() / apart.norm()) < 1.5 * LAYOUTS[name][1] + 0.01
    assert net[0].base_layer.weight is weight
    assert repr(weight.__tensor_flatten__()) == layout
    model.unmerge_adapter()
    assert fingerprint(net) == before
    assert torch.equal(model(x), apart)


def test_a_merged_base_is_saved_and_loaded_by_torch(tmp_path):
    merged = adapted(quantised("int8 by row")).merge_and_unload()
    torch.save(merged.state_dict(), tmp_path / "base.pt")
    fresh = quantised("int8 by row")
    with torch.serialization.safe_globals([type(merged[0].weight)]):
        fresh.load_state_dict(torch.load(tmp_path / "base.pt"), assign=True)
    assert torch.equal(fresh(rows()), merged(rows()))


def test_what_comes_from_a_calibration_is_refused():
    net = quantised("int8 by row")
    net[0].weight.act_pre_scale = torch.ones(64)
    model = adapted(net)
    before = bits_of(net[0].base_layer.weight)
    with pytest.raises(UnsupportedError, match="torchao Int8Tensor, whose values cannot be"):
        model.merge_adapter()
    assert bits_of(net[0].base_layer.weight) == before


def test_a_subclass_that_nobody_knows_how_to_quantise_is_refused_and_still_adapted():
    net = quantised("int8 by row")
    kind = type(net[0].weight)
    other = type("Int2Tensor", (kind,), {})
    names, context = net[0].weight.__tensor_flatten__()
    parts = {name: getattr(net[0].weight, name) for name in names}
    shape, stride = net[0].weight.shape, net[0].weight.stride()
    tensor = other.__tensor_unflatten__(parts, context, shape, stride)
    net[0].weight = nn.Parameter(tensor, requires_grad=False)
    model = adapted(net)
    with pytest.raises(UnsupportedError, match="Int2Tensor, whose values cannot be quantised"):
        model.merge_adapter()
    assert torch.isfinite(model(rows())).all()


def test_a_base_that_is_quantised_after_attaching_is_merged_as_such():
    model = adapted(nn.Sequential(nn.Linear(64, 64)))
    quantize_(model.get_base_model(), LAYOUTS["int8 by row"][0])
    layer = model.get_base_model()[0].base_layer
    before = bits_of(layer.weight)
    model.merge_adapter()
    assert [loss.storage for loss in model.merge_report] == ["torchao"]
    model.unmerge_adapter()
    assert bits_of(layer.weight) == before
