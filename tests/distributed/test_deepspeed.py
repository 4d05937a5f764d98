"""ZeRO-3 by DeepSpeed itself, where it is installed (extra `deepspeed`; it has no wheel)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import deepspeed_jobs as jobs
from tests.distributed.world import World


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_zero_3_trains_saves_merges_and_loads_as_one_process_does(tmp_path: Path) -> None:
    world = World(2)  # of its own: DeepSpeed leaves its marks on a process
    try:
        ranks = world.run(jobs.trained, str(tmp_path))
    finally:
        world.close()
    losses, state, logits = jobs.alone()
    for found, own, outputs, shapes in ranks:
        assert shapes == {(0,)}
        assert found == pytest.approx(losses, rel=1e-5)
        torch.testing.assert_close(own, state, rtol=1e-4, atol=1e-5)
        for output in outputs:
            torch.testing.assert_close(output, logits, rtol=1e-4, atol=1e-5)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved
    for key, value in saved.items():
        torch.testing.assert_close(value, state[f"default/{key}"], rtol=1e-4, atol=1e-5)
