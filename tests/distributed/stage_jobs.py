"""What each rank does in the tests of pipeline stages."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from multigraft import CheckpointError, PeftModel
from multigraft.distributed import fill_base, keep_stage, load_stages, save_stages
from tests.distributed.tiny import adapted, base, batch, loss_of


class Runs(nn.Module):
    """One stage, from tokens or activations to activations or logits."""

    def __init__(self, model: nn.Module, is_first: bool) -> None:
        super().__init__()
        self.model = model
        self.is_first = is_first

    def forward(self, x: Tensor) -> Tensor:
        given = {"input_ids": x} if self.is_first else {"inputs_embeds": x}
        return self.model(**given).logits


def loss_fn(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def steps(model: PeftModel, names: list[str], steps: int) -> list[float]:
    """Train by a schedule of torch's; losses on the last rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model.set_adapter(names)
    stage = PipelineStage(Runs(model, rank == 0), rank, size, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=loss_fn)
    own = [p for name in names for p in model.roster.parameters(name)]
    optimizer = torch.optim.SGD(own, lr=0.5, momentum=0.9)
    found = []
    for step in range(steps):
        losses: list[Tensor] = []
        ids = batch(step)
        if rank == 0:
            schedule.step(ids)
        else:
            schedule.step(target=ids, losses=losses)
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(torch.stack(losses).mean()) if losses else 0.0)
    return found


def trained(names: list[str], save: str, is_early: bool) -> tuple[list[float], list[str], int]:
    """Losses, what is elsewhere, and how many adapted layers there are.

    Args:
        is_early: whether the adapters are attached before the model is split.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    model: Any = base(torch.float32, num_hidden_layers=4)
    if not is_early:
        elsewhere = keep_stage(model, rank, size)
    model = adapted(model, *names)
    if is_early:
        elsewhere = keep_stage(model, rank, size)
    else:  # the values that they would have had
        save_of_whole = f"{save}-began"
        for name in names:
            load_stages(model, save_of_whole, name)
    losses = steps(model, names, 3)
    save_stages(model, save)
    return losses, elsewhere, len(model.base_model.layers())


def from_files(base_folder: str, adapter_folder: str) -> Tensor:
    """Logits of a model that no rank ever held, on the last stage."""
    from transformers import AutoConfig, AutoModelForCausalLM

    rank, size = dist.get_rank(), dist.get_world_size()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base_folder))
    keep_stage(model, rank, size)
    fill_base(model, base_folder)
    model.eval()
    assert not any(p.is_meta for p in model.parameters())
    model = adapted(model)
    load_stages(model, adapter_folder)
    runs, ids = Runs(model, rank == 0), batch(0)
    with torch.no_grad():
        x = ids
        if rank:
            x = torch.empty(*ids.shape, 32)
            dist.recv(x, rank - 1)
        y = runs(x)
        if rank < size - 1:
            dist.send(y.contiguous(), rank + 1)
    return y


def refused(folder: str) -> str:
    """What is said to a stage when a file has something else for it."""
    model = adapted(base(torch.float32, num_hidden_layers=4), r=8)
    keep_stage(model, dist.get_rank(), dist.get_world_size())
    before = [p.clone() for p in model.parameters()]
    try:
        load_stages(model, folder)
    except CheckpointError as error:
        pairs = zip(before, model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        return str(error)
    return ""


def alone(names: list[str]) -> tuple[PeftModel, list[float]]:
    model = adapted(base(torch.float32, num_hidden_layers=4), *names)
    model.set_adapter(names)
    own = [p for name in names for p in model.roster.parameters(name)]
    optimizer = torch.optim.SGD(own, lr=0.5, momentum=0.9)
    losses = []
    for step in range(3):
        loss = loss_of(model, batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return model, losses
