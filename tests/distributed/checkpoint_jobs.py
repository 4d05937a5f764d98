"""What each rank does in the tests of sharded checkpoints."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from multigraft import CheckpointError
from multigraft.distributed import Replicas, load_sharded, save_sharded, shard
from multigraft.whole import is_parted
from tests.distributed.replica_jobs import Result, states
from tests.distributed.tiny import adapted, base, batch, loss_of, share


def steps(
    how: str, first: int, last: int, load: str | None, save: str | None
) -> tuple[Result, dict[str, Any], bool]:
    """Adam steps ``first`` to ``last``, from a saved state and to one.

    Args:
        how: ``alone``, ``replicas``, or FSDP2's ``replicated`` and ``sharded``.

    Returns:
        Losses and adapters, what else was loaded, and whether Adam's moments lie in parts.
    """
    model = adapted(base(torch.float32), "a", "b")
    if load is not None:  # the state is to bring all values
        with torch.no_grad():
            for name in "ab":
                for parameter in model.roster.parameters(name):
                    parameter.zero_()
    replicas = None
    if how == "replicas":
        replicas = Replicas(model)
    elif how != "alone":
        replicas = shard(model, adapters=how)
    own = list(model.roster.parameters("a"))
    optimizer = torch.optim.AdamW(own, lr=1e-2, weight_decay=0.1)
    state = {"model": model, "optimizer": optimizer}
    found = load_sharded(state, load) if load is not None else {}
    losses = []
    for step in range(first, last):
        loss = loss_of(model, batch(step) if replicas is None else share(batch(step)))
        loss.backward()
        if replicas is not None:
            replicas.reduce()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()) if replicas is None else replicas.mean(loss))
    moments = [s["exp_avg"] for s in optimizer.state.values()]
    if save is not None:
        save_sharded({**state, "step": last, "betas": (0.9, {"deep": [1, None]})}, save)
    return (losses, states(model)), found, all(map(is_parted, moments))


def refused(save: str, load: str, how: str) -> str:
    model = adapted(base(torch.float32), "a")
    save_sharded({"model": model}, save)
    other = adapted(base(torch.float32), "other" if how == "names" else "a", r=4 + 4 * (how == "r"))
    before = states(other)
    try:
        load_sharded({"model": other}, load)
    except CheckpointError as error:
        assert all(torch.equal(v, before[k]) for k, v in states(other).items())
        return str(error)
    finally:
        if dist.is_initialized():
            dist.barrier()
    return ""
