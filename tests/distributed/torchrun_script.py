"""A run of six steps that saves its state after every second one, and may lose a rank.

torchrun --nproc-per-node 2 torchrun_script.py FOLDER how
how: `whole`; `killed`, where rank 1 is lost in step 5 of the first attempt; `hangs`, where it
stops to answer there; `saving`, where it is killed while the state after step 4 is written
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch

from multigraft import MultigraftError
from multigraft.distributed import (
    Ranks,
    Replicas,
    checkpoints,
    has_sharded,
    load_sharded,
    save_sharded,
    together,
)
from tests.distributed.plain import ids_of, plain, plain_loss

STEPS = 6


def main(folder: Path, how: str, ranks: Ranks) -> None:
    torch.set_num_threads(1)
    model = plain("default")
    replicas = Replicas(model)
    optimizer = torch.optim.AdamW(list(model.roster.parameters("default")), lr=1e-2)
    state = {"model": model, "optimizer": optimizer}
    step = 0
    if has_sharded(folder / "state"):
        step = load_sharded(state, folder / "state")["step"]
        print(f"rank {ranks.rank} goes on from step {step}", flush=True)
    while step < STEPS:
        plain_loss(model, ids_of(step).chunk(ranks.size)[ranks.rank]).backward()
        is_lost = ranks.rank == 1 and step == 4 and ranks.restarts == 0
        if is_lost and how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if is_lost and how == "hangs":
            time.sleep(60)
        replicas.reduce()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 2 == 0:
            if how == "saving" and step == 4 and ranks.rank == 1 and ranks.restarts == 0:
                checkpoints.save = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
            save_sharded({**state, "step": step}, folder / "state")
    model.save_pretrained(folder / "adapter", is_main_process=ranks.is_main)


if __name__ == "__main__":
    try:
        with together(timeout=float(os.environ.get("LIMIT", "60"))) as found:
            main(Path(sys.argv[1]), sys.argv[2], found)
    except MultigraftError as error:
        sys.exit(f"error: {error}")
