"""ZeRO-3: parts are put together for saving, loading and merging; an empty tensor never is saved.

DeepSpeed has no wheel, so what it does to a model is done by a stand-in (`fake_deepspeed`).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from multigraft import LoraConfig, get_peft_model
from tests.distributed import zero_jobs as jobs
from tests.distributed.plain import Net, ids_of
from tests.distributed.world import World


def test_a_partitioned_model_trains_saves_merges_and_loads(two: World, tmp_path: Path) -> None:
    model, logits, gradients, merged = jobs.alone()
    state = jobs.states(model)
    for found in two.run(jobs.lifecycle, str(tmp_path)):
        torch.testing.assert_close(found["logits"], logits)
        assert len(found["gradients"]) == len(gradients)
        for own, expected in zip(found["gradients"], gradients, strict=True):
            torch.testing.assert_close(own, expected)
        torch.testing.assert_close(found["states"], state)
        assert found["files"] == ["adapter_model.safetensors", "b/adapter_model.safetensors"]
        assert found["moved"] == 4  # weights
        torch.testing.assert_close(found["merged"], merged)
        assert found["is_restored"]
        key = "default/base_model.model.blocks.0.up.lora_A.weight"
        torch.testing.assert_close(found["doubled"][key], 2 * state[key])
        torch.testing.assert_close(found["loaded"], state)
        assert found["empty"]
    saved = load_file(tmp_path / "adapter_model.safetensors")
    torch.testing.assert_close(
        {f"default/{k}": v for k, v in saved.items()},
        {k: v for k, v in state.items() if k.startswith("default/")},
    )


def test_an_initialisation_reads_a_partitioned_base(two: World) -> None:
    torch.manual_seed(0)
    net = Net()
    config = LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights="pissa")
    model = get_peft_model(net, config)
    with torch.no_grad():
        logits = model(ids_of(0))
    A = jobs.states(model)["default/base_model.model.blocks.0.up.lora_A.weight"]
    for own_logits, own_A, message in two.run(jobs.attached_late):
        torch.testing.assert_close(own_A, A)
        torch.testing.assert_close(own_logits, logits)
        assert "is one of DeepSpeed's (ZeRO-3)" in message


@pytest.mark.parametrize("is_ancient", [False, True], ids=["absent", "ancient"])
def test_nothing_empty_is_saved_where_deepspeed_is(
    two: World, tmp_path: Path, is_ancient: bool
) -> None:
    for message, files in two.run(jobs.without, str(tmp_path), is_ancient):
        assert "deepspeed.zero.GatheredParameters is not to be had" in message
        assert not files
