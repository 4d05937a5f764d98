"""4-bit weights of bitsandbytes: not quantised yet, quantised, packed for evaluation, saved."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from multigraft import (
    LoraConfig,
    MultigraftWarning,
    PeftModel,
    StateError,
    TargetError,
    UnsupportedError,
    get_peft_model,
)
from multigraft.storage import bnb4, storage_of
from tests.laws import bits_of, fingerprint
from tests.storage.cases import CASES

KINDS = [name for name in CASES if name.startswith(("bnb-nf4", "bnb-fp4"))]
LORA = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "merged into quantised", MultigraftWarning)
        yield


def unquantised(**options: object) -> Linear4bit:
    torch.manual_seed(0)
    return Linear4bit(64, 64, quant_type="nf4", **options)


def pack(layer: nn.Module) -> None:
    """What an evaluation forward does on CPUs with AVX512-BF16, on any CPU."""
    weight = layer.weight
    weight.data, _ = functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)


def rows(seed: int = 3) -> Tensor:
    return torch.randn(3, 64, generator=torch.Generator().manual_seed(seed))


# -- before it is quantised -----------------------------------------------------------------------


def test_a_weight_that_is_not_quantised_yet_reads_as_it_is_and_refuses_a_merge():
    layer = unquantised()
    assert torch.equal(storage_of(layer).read(layer), layer.weight.detach())
    model = get_peft_model(nn.Sequential(layer), LORA)
    with pytest.raises(UnsupportedError, match="not quantised yet: move the model to its device"):
        model.merge_adapter()


def test_adapters_attached_before_quantising_serve_the_quantised_layer():
    model = get_peft_model(nn.Sequential(unquantised()), LORA)
    model.to("cpu")
    layer = model.get_base_model()[0].base_layer
    assert layer.weight.dtype is torch.uint8
    before = bits_of(layer.weight)
    model.merge_adapter()
    model.unmerge_adapter()
    assert bits_of(layer.weight) == before


def test_a_weight_on_the_meta_device_refuses_a_merge():
    layer = unquantised(device="meta")
    assert "not quantised yet" in storage_of(layer).refusal(layer)
    model = get_peft_model(nn.Sequential(layer), LORA)
    with pytest.raises(StateError, match=r"`lora_A\.weight` of `default` is on the meta"):
        model.merge_adapter()


def test_a_quantised_layer_is_no_module_to_save():
    base = nn.Sequential(CASES["bnb-nf4"].make(64, 64), nn.Linear(64, 64))
    config = LoraConfig(target_modules=["1"], modules_to_save=["0"])
    with pytest.raises(TargetError, match="quantised copy cannot be trained"):
        get_peft_model(base, config)


# -- what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_quantising_again_is_bitsandbytes_own_quantising(name):
    layer, wanted = CASES[name].make(64, 128), 0.1 * torch.randn(128, 64)
    storage_of(layer).write(layer, wanted)
    data, state = functional.quantize_4bit(
        wanted, quant_type=layer.weight.quant_type, compress_statistics="double" in name
    )
    assert torch.equal(layer.weight.data, data)
    assert torch.equal(layer.weight.quant_state.absmax, state.absmax)
    assert layer.weight.quant_state.nested == state.nested == ("double" in name)


@pytest.mark.parametrize("name", KINDS)
def test_layer_and_weight_share_one_state_through_merge_and_unmerge(name):
    model = get_peft_model(nn.Sequential(CASES[name].make(64, 64)), LORA)
    layer = model.get_base_model()[0].base_layer
    weight, state = layer.weight, layer.quant_state
    for change in (model.merge_adapter, model.unmerge_adapter):
        change()
        assert layer.weight is weight
        assert layer.quant_state is weight.quant_state is state


def test_a_weight_that_sharding_has_rebuilt_is_read_through_the_layers_state():
    layer = CASES["bnb-nf4"].make(64, 64)
    read = storage_of(layer).read(layer)
    layer.weight.quant_state = None
    assert torch.equal(storage_of(layer).read(layer), read)


@pytest.mark.parametrize("kept_in", [torch.uint8, torch.bfloat16, torch.float16])
def test_data_kept_in_another_dtype_come_back_in_it(kept_in):
    layer = unquantised(quant_storage=kept_in).to("cpu")
    model = get_peft_model(nn.Sequential(layer), LORA)
    before = fingerprint(model.get_base_model())
    model.merge_adapter()
    assert layer.weight.dtype is kept_in
    model.unmerge_adapter()
    assert fingerprint(model.get_base_model()) == before


@pytest.mark.parametrize("autocast", [True, False])
def test_adapters_are_float32_unless_asked_to_follow_the_compute_dtype(autocast):
    base = nn.Sequential(unquantised(compute_dtype=torch.bfloat16).to("cpu"))
    model = get_peft_model(base, LORA, autocast_adapter_dtype=autocast)
    found = {p.dtype for p in model.parameters() if p.requires_grad}
    assert found == {torch.float32 if autocast else torch.bfloat16}


@pytest.mark.parametrize("name", KINDS)
def test_a_merged_base_is_saved_and_loaded_by_bitsandbytes(name):
    model = get_peft_model(nn.Sequential(CASES[name].make(64, 64)), LORA).train()
    merged = model.merge_and_unload()
    state = merged[0].state_dict()
    statistics = {k.removeprefix("weight."): v for k, v in state.items() if "weight." in k}
    weight = type(merged[0].weight).from_prequantized(
        state["weight"], quantized_stats=statistics, device="cpu"
    )
    fresh = CASES[name].make(64, 64, seed=9).train()
    fresh.weight, fresh.bias = weight, merged[0].bias
    assert torch.equal(fresh(rows()), merged[0](rows()))


# -- packed for evaluation ------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_a_packed_weight_reads_as_the_plain_one_up_to_its_rounded_statistics(name):
    layer = CASES[name].make(64, 128)
    storage = storage_of(layer)
    plain = storage.read(layer)
    pack(layer)
    assert layer.weight.quant_state.packing_format_for_cpu
    error = (storage.read(layer) - plain).abs() / plain.abs().clamp(min=1e-9)
    assert float(error.max()) <= 2**-8  # of bfloat16
    assert storage.read(layer).dtype is plain.dtype


@pytest.mark.parametrize("name", KINDS)
def test_a_packed_weight_is_merged_into_and_given_back_as_it_lay(name):
    model = get_peft_model(nn.Sequential(CASES[name].make(64, 128)), LORA)
    layer = model.get_base_model()[0].base_layer
    pack(layer)
    before, read = bits_of(layer.weight), storage_of(layer).read(layer)
    delta = model.get_base_model()[0].grafts["default"][0].method
    delta = delta.delta(model.get_base_model()[0].grafts["default"][0].params)
    model.merge_adapter()
    merged = storage_of(layer).read(layer)
    assert float((merged - read - delta).norm() / (read + delta).norm()) < CASES[name].error
    model.unmerge_adapter()
    assert bits_of(layer.weight) == before


@pytest.mark.parametrize("name", KINDS)
def test_a_weight_packed_in_inference_mode_is_merged_into_and_hidden(name):
    model = get_peft_model(nn.Sequential(CASES[name].make(64, 64)), LORA).eval()
    with torch.inference_mode():
        apart, plain = model(rows()), model.get_base_model()[0].base_layer(rows())
    model.merge_adapter()
    with torch.inference_mode():
        model(rows())
    with model.disable_adapter(), torch.inference_mode():
        assert torch.equal(model(rows()), plain)
    model.unmerge_adapter()
    with torch.inference_mode():
        assert torch.equal(model(rows()), apart)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_flow_again_in_training_after_an_evaluation(name, bias):
    """Packed weights have no backward: bitsandbytes raises, or cuts the graph silently."""
    layers = [CASES[name].make(64, 64, bias=bias, seed=seed) for seed in (0, 1)]
    model = get_peft_model(nn.Sequential(*layers), LORA).train()
    wanted = gradients(model)
    model.eval()
    for layer in (layers[0], layers[1]):
        pack(layer)
    model.train()
    for found, expected in zip(gradients(model), wanted, strict=True):
        assert float((found - expected).norm() / expected.norm()) < 2**-7


def gradients(model: PeftModel) -> list[Tensor]:
    model.zero_grad()
    model(rows()).square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("name", KINDS)
def test_unpacking_keeps_the_very_values(name):
    layer = CASES[name].make(64, 128)
    pack(layer)
    read = storage_of(layer).read(layer)
    storage_of(layer).make_differentiable(layer)
    assert not hasattr(layer.weight.quant_state, "packing_format_for_cpu")
    assert torch.equal(storage_of(layer).read(layer), read)
    pack(layer)
    assert torch.equal(storage_of(layer).read(layer), read)


def test_a_kept_state_is_not_touched_by_unpacking():
    layer = CASES["bnb-nf4-double"].make(64, 128)
    pack(layer)
    kept = storage_of(layer).keep(layer)
    before = copy.deepcopy(kept)
    storage_of(layer).make_differentiable(layer)
    assert torch.equal(kept[0], before[0])
    assert vars(kept[1]).keys() == vars(before[1]).keys()
    assert torch.equal(kept[1].absmax, before[1].absmax)


def test_no_import_of_bitsandbytes_is_needed_to_ask():
    assert isinstance(storage_of(CASES["bnb-nf4"].make(64, 64)), bnb4.Bnb4)
    assert not isinstance(storage_of(nn.Linear(4, 4)), bnb4.Bnb4)
