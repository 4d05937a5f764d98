from __future__ import annotations

import pytest
import torch

from multigraft import LoraConfig, get_peft_model
from multigraft.kernels import is_autocasting, without_autocast


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapted_model_runs_forwards_and_backwards_without_memory(use_dora):
    with torch.device("meta"):
        base = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 3))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "1"], use_dora=use_dora))
    y = model(torch.empty(5, 8, device="meta"))
    y.sum().backward()
    assert y.shape == (5, 3)
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.is_meta for g in grads)


def test_autocast_is_noticed_and_switched_off_in_a_block():
    x = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert is_autocasting(x)
        with without_autocast(x):
            assert not is_autocasting(x)
            assert (x @ x).dtype == torch.float32
    assert not is_autocasting(x)
