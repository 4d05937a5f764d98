"""Combining reads no weight but DoRA's norm, so it works on every storage that LoRA works on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from multigraft import LoraConfig, PeftModel
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
