"""Combining, extracting and converting work on every storage that LoRA works on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from multigraft import HiraConfig, LoraConfig, PeftModel, convert_to_lora, extract_lora
from tests.storage.cases import CASES


@pytest.mark.parametrize("use_dora", [False, True], ids=["plain", "DoRA"])
@pytest.mark.parametrize("name", CASES)
def test_one_of_two_at_weight_one_is_itself(name: str, use_dora: bool) -> None:
    case = CASES[name]
    model = PeftModel(nn.Sequential(case.make(64, 32)), None)
    for adapter in "ab":
        torch.manual_seed(ord(adapter))
        config = LoraConfig(
            target_modules=["0"], r=2, use_dora=use_dora, init_lora_weights=False, use_rslora=True
        )
        model.add_adapter(adapter, config)
    x = torch.randn(3, 64, dtype=case.dtype)
    model.add_weighted_adapter(["a", "b"], [1.0, 0.0], "sum", "svd")
    found = {}
    for adapter in ("a", "sum"):
        model.set_adapter(adapter)
        found[adapter] = model.eval()(x).float().detach()
    with model.disable_adapter():
        change = (found["a"] - model(x).float()).abs().max()
    assert (found["sum"] - found["a"]).abs().max() < 0.05 * change


@pytest.mark.parametrize("name", CASES)
def test_a_difference_is_taken_from_the_values_that_the_base_computes_with(name: str) -> None:
    case = CASES[name]
    base = nn.Sequential(case.make(64, 32))
    own = PeftModel(base, LoraConfig(target_modules=["0"])).base_model.layers()[0]
    (graft,) = own.grafts["default"]
    W = graft.site.weight().detach().to(case.dtype)
    change = torch.zeros_like(W, dtype=torch.float32)
    change[:3, :5] = 1.0
    tuned = {"0.weight": W.float() + change, "0.bias": own.base_layer.bias}
    found = extract_lora(base, tuned, 1.0)
    pair = [found.state_dict[f"base_model.model.0.lora_{f}.weight"].float() for f in "BA"]
    spread = float(W.float().abs().max()) * torch.finfo(case.dtype).eps
    torch.testing.assert_close(pair[0] @ pair[1], change, atol=1e-5 + spread, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_what_reads_the_weight_is_converted(name: str) -> None:
    """HiRA's update is the weight times a pair."""
    case = CASES[name]
    model = PeftModel(nn.Sequential(case.make(64, 32)), HiraConfig(target_modules=["0"], r=2))
    with torch.no_grad():
        for parameter in model.roster.parameters("default"):
            parameter.normal_(std=0.3)
    (graft,) = model.base_model.layers()[0].grafts["default"]
    W = graft.site.weight().detach().float()
    expected = graft.method.delta(graft.params, W).detach().float()
    _, state = convert_to_lora(model, 1.0)
    pair = [state[f"base_model.model.0.lora_{f}.weight"].float() for f in "BA"]
    close = 1e-2 if pair[0].dtype != graft.site.weight().dtype else 1e-4
    torch.testing.assert_close(pair[0] @ pair[1], expected, atol=close, rtol=close)
