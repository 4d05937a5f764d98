"""Quantised bases are planned with the bytes that bitsandbytes gives them."""

from __future__ import annotations

import pytest
import torch

from multigraft import LoraConfig
from multigraft.errors import ConfigError
from multigraft.kbit import prepare_model_for_kbit_training
from multigraft.planning import plan
from multigraft.train import load_model
from tests.planning import measured

transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

ALL = {"default": LoraConfig(r=4, target_modules="all-linear")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def bytes_of_base(model):
    """Parameters and what quantisation keeps beside them."""
    size = 0
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            size += parameter.nbytes
            state = getattr(parameter, "quant_state", None)
            while state is not None:
                size += sum(v.nbytes for v in vars(state).values() if isinstance(v, torch.Tensor))
                state = state.state2
            rows = getattr(parameter, "SCB", None)
            size += 0 if rows is None else rows.nbytes
    return size


@pytest.mark.parametrize("quantize", ["nf4", "fp4", "int8"])
def test_the_packed_base_takes_what_is_planned(folder, quantize):
    real = load_model(folder, dtype="bfloat16", device="cpu", quantize=quantize)
    prepare_model_for_kbit_training(real, use_gradient_checkpointing=False)
    found = plan(folder, ALL, batch_size=1, max_length=8, dtype="bfloat16", quantize=quantize)
    inputs = 2 * 8 * 8 + sum(b.nbytes for b in real.buffers())
    assert found.parts["base weights"] == pytest.approx(bytes_of_base(real) + inputs, rel=0.01)


def test_a_packed_base_keeps_what_is_planned_for_the_backward_pass(folder):
    real = load_model(folder, dtype="bfloat16", device="cpu", quantize="nf4")
    prepare_model_for_kbit_training(real, use_gradient_checkpointing=False)
    model = measured.trainable(real, ALL, False)
    batch = measured.batch_of(model, ["default"], 3, 16)
    options = {"dtype": "bfloat16", "quantize": "nf4", "device": "cpu"}
    found = plan(folder, ALL, batch_size=3, max_length=16, **options)
    assert found.kept == pytest.approx(measured.kept(model, batch), rel=0.02)


def test_a_method_that_reads_the_weight_is_planned_on_a_packed_base(folder):
    adapters = {"d": LoraConfig(r=4, target_modules="all-linear", use_dora=True)}
    found = plan(folder, adapters, batch_size=1, max_length=8, quantize="nf4")
    assert found.parts["base weights"] < plan(folder, adapters, max_length=8).parts["base weights"]


def test_an_unknown_format_is_refused(folder):
    with pytest.raises(ConfigError, match=r"`quantize` \(='nf5'\) must be one of nf4, fp4, int8"):
        plan(folder, ALL, quantize="nf5")
