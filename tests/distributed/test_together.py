"""Under torchrun: a lost rank ends the run clearly, the last state is whole, and it goes on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from multigraft import ConfigError, get_peft_model_state_dict
from multigraft.distributed import Ranks, load_sharded, together
from multigraft.distributed.together import is_loss
from tests.distributed.plain import ids_of, plain, plain_loss

joining = sys.modules["multigraft.distributed.together"]  # the package's name for it is a function
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("torchrun_script.py")


def torchrun(folder: Path, how: str, restarts: int = 0, limit: float = 60) -> tuple[int, str]:
    """The exit status and the output."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts)),
            *("--monitor-interval", "0.1", str(SCRIPT), str(folder), how),
        ],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
            "LIMIT": str(limit),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=150,
        check=False,
    )
    return done.returncode, done.stdout


def uninterrupted() -> dict[str, torch.Tensor]:
    """The adapter that one process makes of all rows."""
    model = plain("default")
    optimizer = torch.optim.AdamW(list(model.roster.parameters("default")), lr=1e-2)
    for step in range(6):
        plain_loss(model, ids_of(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return get_peft_model_state_dict(model)


@pytest.mark.slow
def test_torchrun_goes_on_after_a_rank_was_killed(tmp_path: Path) -> None:
    status, output = torchrun(tmp_path, "killed", restarts=1)
    assert status == 0, output
    assert "rank 0 goes on from step 4" in output
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    whole = uninterrupted()
    assert found.keys() == whole.keys()
    for key, value in whole.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_run_in_time_and_leaves_the_state_whole(tmp_path: Path) -> None:
    start = time.monotonic()
    status, output = torchrun(tmp_path, "hangs", limit=4)
    assert time.monotonic() - start < 50  # the rank would sleep for 60 s
    assert status != 0
    assert "error: rank 0: another process was lost, or did not answer within 4 s" in output
    assert "The last checkpoint is whole" in output
    assert load_sharded({}, tmp_path / "state")["step"] == 4


@pytest.mark.slow
def test_a_rank_that_is_killed_while_saving_leaves_the_state_before(tmp_path: Path) -> None:
    status, output = torchrun(tmp_path, "saving")
    assert status != 0
    assert "SIGKILL" in output
    assert load_sharded({}, tmp_path / "state")["step"] == 2


def test_an_attempt_sees_nothing_that_earlier_ones_left_in_the_store(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left = torch.distributed.HashStore()
    stores: list = []
    monkeypatch.setattr(joining, "rendezvous", lambda *args, **options: iter([(left, 0, 1)]))
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda *args, store, **more: stores.append(store)
    )
    for restarts in (0, 1, 1):  # the last one without a loss: a machine came or went
        joining._join(torch.device("cpu"), restarts, timedelta(seconds=1))
    stores[0].set("address", "of the first attempt")
    stores[1].set("other", "of the second")
    assert stores[0].check(["address"])
    assert not any(store.check(["address"]) for store in stores[1:])
    assert not stores[2].check(["other"])


def test_a_process_by_itself_is_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with together(device="cpu") as ranks:
        assert ranks == Ranks(0, 1, torch.device("cpu"), 0)
        assert ranks.is_main
        assert not torch.distributed.is_initialized()


def test_an_error_of_ones_own_is_no_loss() -> None:
    assert is_loss(RuntimeError("Connection closed by peer [127.0.0.1]:2"))
    assert not is_loss(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="my own"), together(device="cpu"):
        raise RuntimeError("my own")


def test_a_timeout_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`timeout` \(=0\) must be a positive"), together(0):
        pass
