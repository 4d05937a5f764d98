"""LN tuning against PEFT: a trained copy in the place of each norm."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import nn

from multigraft import (
    LNTuningConfig,
    LoraConfig,
    StateError,
    TargetError,
    get_peft_model,
    get_peft_model_state_dict,
)
from tests import oracle
from tests.methods.against_peft import ROWS, Case, One, StartsLikePeft


class RMSNorm(nn.Module):
    """A norm of one's own, as transformers' models have them."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., features)``, scaled to unit mean square and by the weight."""
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


NORMS = {
    "LayerNorm": lambda: One(nn.LayerNorm(8), (ROWS, 8)),
    "LayerNorm without bias": lambda: One(nn.LayerNorm(8, bias=False), (ROWS, 8)),
    "GroupNorm": lambda: One(nn.GroupNorm(2, 8), (ROWS, 8, 4)),
    "torch's RMSNorm": lambda: One(nn.RMSNorm(8), (ROWS, 8)),
    "a norm of one's own": lambda: One(RMSNorm(8), (ROWS, 8)),
    "a linear layer": lambda: One(nn.Linear(8, 4), (ROWS, 8)),
}


class TestLNTuning(StartsLikePeft):
    kind = "LNTuningConfig"
    cases: ClassVar = {name: Case(make) for name, make in NORMS.items()}


def test_no_targets_means_the_architectures_norms() -> None:
    model = get_peft_model(oracle.llama(), LNTuningConfig(task_type="CAUSAL_LM"))
    names = {n.removeprefix("base_model.model.model.") for n in get_peft_model_state_dict(model)}
    assert names == {
        *(f"layers.{i}.input_layernorm.ln_tuning_layers.weight" for i in (0, 1)),
        *(f"layers.{i}.post_attention_layernorm.ln_tuning_layers.weight" for i in (0, 1)),
        "norm.ln_tuning_layers.weight",
    }


def test_two_that_tune_the_same_norm_cannot_act_at_once() -> None:
    model = get_peft_model(One(nn.LayerNorm(8), (1, 8)), LNTuningConfig(target_modules=["layer"]))
    model.add_adapter("other", LNTuningConfig(target_modules=["layer"]))
    with pytest.raises(StateError, match="`ln_tuning_layers`"):
        model.set_adapter(["default", "other"])


def test_a_module_without_tensors_is_refused() -> None:
    with pytest.raises(TargetError, match="layer \\(Identity\\) has no tensors to train"):
        get_peft_model(One(nn.Identity(), (1, 8)), LNTuningConfig(target_modules=["layer"]))


def test_a_lora_beside_it_keeps_to_itself() -> None:
    model = get_peft_model(oracle.llama(), LNTuningConfig(task_type="CAUSAL_LM")).eval()
    model.add_adapter("lora", LoraConfig(task_type="CAUSAL_LM"))
    state = get_peft_model_state_dict(model, adapter_name="lora")
    assert all(".lora_" in key for key in state)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln_tuning_layers" in name or "lora_B" in name:
                parameter.normal_()
    ids = torch.tensor([[3, 4, 5]])
    alone = [model(ids).logits, (model.set_adapter("lora"), model(ids).logits)[1]]
    model.set_adapter(["default", "lora"])
    both = model(ids).logits
    assert not torch.allclose(both, alone[0]) and not torch.allclose(both, alone[1])
    model.delete_adapter("lora")
    model.set_adapter("default")
    assert torch.equal(model(ids).logits, alone[0])
