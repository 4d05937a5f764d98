"""What each rank does with DeepSpeed itself."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed.plain import ids_of, plain, plain_loss
from tests.distributed.replica_jobs import launched, rank, states

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,
}


def trained(folder: str) -> tuple[list[float], dict[str, Tensor], list[Tensor], set[Any]]:
    """Losses, adapters, and logits: as trained, merged, unmerged and loaded again."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    with launched():
        return _trained(folder)


def _trained(folder: str) -> tuple[list[float], dict[str, Tensor], list[Tensor], set[Any]]:
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    model = plain("default", "b")
    own = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    engine, *_ = deepspeed.initialize(model=model, optimizer=own, config=CONFIG)
    shapes = {tuple(p.shape) for p in model.parameters()}
    losses = []
    for step in range(3):
        loss = plain_loss(engine, ids_of(step).chunk(dist.get_world_size())[rank()])
        engine.backward(loss)
        engine.step()
        whole = loss.detach().clone()
        dist.all_reduce(whole)
        losses.append(float(whole) / dist.get_world_size())
    model.save_pretrained(folder, is_main_process=rank() == 0)
    saved = states(model)
    found = []
    with torch.no_grad():
        found.append(engine(ids_of(0)))
        model.merge_adapter()
        found.append(engine(ids_of(0)))
        model.unmerge_adapter()
        found.append(engine(ids_of(0)))
        model.load_adapter(folder, "default")
        found.append(engine(ids_of(0)))
    return losses, saved, found, shapes


def alone() -> tuple[list[float], dict[str, Tensor], Tensor]:
    model = plain("default", "b")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for step in range(3):
        loss = plain_loss(model, ids_of(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        return losses, states(model), model(ids_of(0))
