"""MiCA against PEFT: B at the weight's minor directions, and frozen."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import multigraft
from multigraft import LoraConfig, TargetError, UnsupportedError
from tests.methods.against_peft import StartsLikePeft
from tests.variants.single import AgreesInSingle, Single

MICA = {"r": 3, "lora_alpha": 6, "init_lora_weights": "mica"}


class TestMica(AgreesInSingle, StartsLikePeft):
    kind = "LoraConfig"
    cases: ClassVar = {
        "linear": Single("linear", MICA),
        "no bias": Single("linear wide", MICA),
        "Conv1D": Single("conv1d_transposed", MICA),
        "embedding": Single("embedding", MICA),
        "rsLoRA": Single("linear", MICA | {"use_rslora": True}),
        "dropout in evaluation": Single("linear", MICA | {"lora_dropout": 0.5}),
    }


def adapted(**options: Any) -> Any:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(9, 7))
    chosen = {"r": 3, "target_modules": ["0"], "init_lora_weights": "mica"} | options
    return multigraft.get_peft_model(net, LoraConfig(**chosen))


def factor(model: Any, which: str, adapter: str = "default") -> nn.Parameter:
    """One of an adapter's two factors."""
    found: nn.Parameter = model.get_parameter(f"base_model.model.0.{which}.{adapter}.weight")
    return found


def test_b_is_orthonormal_and_least_of_the_weight() -> None:
    model = adapted()
    W, B = model.get_base_model()[0].base_layer.weight, factor(model, "lora_B")
    torch.testing.assert_close(B.T @ B, torch.eye(3))
    least = torch.linalg.svdvals(W)[-3:]
    torch.testing.assert_close(torch.linalg.svdvals(B.T @ W), least)
    assert not factor(model, "lora_A").any()


def test_training_moves_a_alone() -> None:
    model = adapted()
    before = factor(model, "lora_B").clone()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 9)).square().sum().backward()
    optimiser.step()
    assert torch.equal(factor(model, "lora_B"), before)
    assert factor(model, "lora_A").any()


def test_b_stays_frozen_when_the_adapter_is_activated_again() -> None:
    model = adapted()
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["0"]))
    model.set_adapter("plain")
    model.set_adapter("default")
    assert not factor(model, "lora_B").requires_grad
    assert factor(model, "lora_A").requires_grad
    model.set_adapter("plain")
    assert factor(model, "lora_B", "plain").requires_grad


def test_loaded_for_training_b_is_frozen(tmp_path: Any) -> None:
    adapted().save_pretrained(tmp_path)
    base = nn.Sequential(nn.Linear(9, 7))
    model = multigraft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    assert not factor(model, "lora_B").requires_grad
    assert factor(model, "lora_A").requires_grad


def test_it_runs_as_a_plain_pair_in_a_mixed_batch() -> None:
    model = adapted().eval()
    with torch.no_grad():
        factor(model, "lora_A").normal_()
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    x = torch.randn(3, 9)
    rows = model(x, adapter_names=["default", "plain", "__base__"])
    for row, name in enumerate(["default", "plain"]):
        model.set_adapter(name)
        torch.testing.assert_close(rows[row], model(x)[row])


def test_the_word_is_read_in_any_case_as_peft_does() -> None:
    torch.testing.assert_close(
        factor(adapted(init_lora_weights="MiCA"), "lora_B"), factor(adapted(), "lora_B")
    )


def test_a_rank_above_the_weights_is_refused() -> None:
    with pytest.raises(TargetError, match=r"rank \(=8\) must be at most 7.*lower `r`"):
        adapted(r=8)


def test_convolutions_are_refused_with_what_to_do() -> None:
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="mica")
    with pytest.raises(TargetError, match="for linear layers, not for conv; leave this layer"):
        multigraft.get_peft_model(nn.Sequential(nn.Conv1d(4, 4, 3)), config)


def test_it_is_one_variant_among_others() -> None:
    with pytest.raises(UnsupportedError, match="`dora`, `mica`"):
        LoraConfig(init_lora_weights="mica", use_dora=True)
