"""transformers' Trainer under torchrun: its DDP makes the adapters of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.test_together import ROOT

SCRIPT = Path(__file__).with_name("trainer_script.py")
SEVERAL = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def adapters_of(folder: Path, rows: int, launcher: list[str]) -> dict[str, torch.Tensor]:
    """Both adapters in the last checkpoint."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), str(folder), str(rows)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    last = folder / "checkpoint-4"
    return {
        f"{place.name}/{key}": value
        for place in (last, last / "idle")
        for key, value in load_file(place / "adapter_model.safetensors").items()
    }


@pytest.mark.slow
def test_two_processes_train_as_one_does_beside_an_idle_adapter(tmp_path: Path) -> None:
    alone = adapters_of(tmp_path / "alone", 4, [])
    found = adapters_of(tmp_path / "two", 2, SEVERAL)
    assert found.keys() == alone.keys()
    for key, value in alone.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=key)
    first = load_file(tmp_path / "two" / "checkpoint-2" / "adapter_model.safetensors")
    moved = [not torch.equal(value, found[f"checkpoint-4/{key}"]) for key, value in first.items()]
    assert all(moved)
