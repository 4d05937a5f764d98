"""T25: saving what is whole says nothing.

PEFT 0.21.2 warns that `lora_B.bias` has an "invalid shape" and its shards were not gathered.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import multigraft
from multigraft import CheckpointError, LoraConfig, PeftModel, get_peft_model
from tests.oracle import Net, build, inputs, output, random_state

WHOLE: dict[str, dict[str, Any]] = {
    "a bias of B": {"target_modules": ["lin0", "conv1", "turned"], "lora_bias": True},
    "of rank 1": {"target_modules": ["lin0", "emb"], "r": 1},
    "a layer of one output": {"target_modules": ["lin0"], "r": 1, "lora_bias": True},
    "biases": {"target_modules": ["lin0"], "bias": "all"},
    "magnitudes": {"target_modules": ["lin0", "conv1"], "use_dora": True},
    "a saved norm": {"target_modules": ["lin0"], "modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("options", WHOLE.values(), ids=WHOLE)
def test_t25_saving_and_loading_say_nothing(options: dict[str, Any], tmp_path: Path):
    model = get_peft_model(build(Net), LoraConfig(**options)).eval()
    state = random_state(multigraft.get_peft_model_state_dict(model))
    multigraft.set_peft_model_state_dict(model, state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(build(Net), tmp_path).eval()
    assert torch.equal(output(loaded, inputs(loaded)), output(model, inputs(model)))


def test_t25_the_bias_is_in_the_file_as_pefts_readers_want_it(tmp_path: Path):
    model = get_peft_model(build(Net), LoraConfig(target_modules=["lin0"], lora_bias=True))
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert state["base_model.model.lin0.lora_B.bias"].shape == (24,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peft.PeftModel.from_pretrained(build(Net), tmp_path)


def test_t25_a_tensor_without_values_is_still_noticed(tmp_path: Path):
    model = get_peft_model(build(Net), LoraConfig(target_modules=["lin0"], lora_bias=True))
    layer = model.get_base_model().lin0
    layer.lora_B["default"].bias = torch.nn.Parameter(torch.empty(0))
    with pytest.raises(CheckpointError, match=r"lin0\.lora_B\.bias` holds no values"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_t25_is_still_so_in_peft(tmp_path: Path):
    config = peft.LoraConfig(target_modules=["lin0"], lora_bias=True)
    with pytest.warns(UserWarning, match="invalid shape"):
        peft.get_peft_model(build(Net), config).save_pretrained(tmp_path)
