"""What each rank does in the tests of data parallelism."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from multigraft import MultigraftWarning, PeftModel, TrainingError, get_peft_model_state_dict
from multigraft.distributed import Replicas
from tests.distributed.tiny import adapted, base, batch, lora, loss_of, share

Result = tuple[list[float], dict[str, Tensor]]


def rank() -> int:
    return torch.distributed.get_rank()


@contextmanager
def launched() -> Iterator[None]:
    """The environment that torchrun gives a process, which some libraries ask for."""
    own = {"RANK": rank(), "LOCAL_RANK": rank(), "WORLD_SIZE": torch.distributed.get_world_size()}
    os.environ.update({name: str(value) for name, value in own.items()})
    try:
        yield
    finally:
        for name in own:
            del os.environ[name]


def states(model: PeftModel) -> dict[str, Tensor]:
    """Every adapter's tensors, as a file has them."""
    return {
        f"{name}/{key}": value.detach().clone()
        for name in model.peft_config
        for key, value in get_peft_model_state_dict(model, adapter_name=name).items()
    }


def train(model: PeftModel, forward: Any, plan: list[Any], mine: Any, reduce: Any) -> list[float]:
    """One step for each entry: names to activate, or a row's adapters.

    Args:
        mine: this rank's share of rows.
        reduce: between backward and step.
    """
    optimizers: dict[str, torch.optim.Optimizer] = {}
    losses = []
    for step, entry in enumerate(plan):
        options = {}
        if "rows" in entry:
            options["adapter_names"] = list(mine(entry["rows"]))
        if model.active_adapters != entry["active"]:
            model.set_adapter(entry["active"])
        for name in entry["active"]:
            if name not in optimizers:
                own = list(model.roster.parameters(name))
                optimizers[name] = torch.optim.SGD(own, lr=0.5, momentum=0.9, weight_decay=0.01)
        loss = loss_of(forward, mine(batch(step)), **options)
        if loss.requires_grad:  # no row of this rank has an adapter
            loss.backward()
        reduce()
        for name in entry["active"]:
            optimizers[name].step()
            optimizers[name].zero_grad()
        losses.append(float(loss.detach()))
    return losses


def share_any(rows: Any) -> Any:
    if isinstance(rows, Tensor):
        return share(rows)
    half = len(rows) // torch.distributed.get_world_size()
    return rows[rank() * half : (rank() + 1) * half]


def alone(names: tuple[str, ...], plan: list[Any]) -> Result:
    """The same in a single process, on all rows."""
    model = adapted(base(), *names)
    losses = train(model, model, plan, lambda rows: rows, lambda: None)
    return losses, states(model)


def with_replicas(names: tuple[str, ...], plan: list[Any]) -> Result:
    model = adapted(base(), *names)
    with torch.no_grad():  # rank 0's values are to count
        for parameter in model.roster.parameters(names[0]):
            parameter.mul_(1 + rank())
    replicas = Replicas(model)
    losses = train(model, model, plan, share_any, replicas.reduce)
    return [replicas.mean(loss) for loss in losses], states(model)


def with_ddp(names: tuple[str, ...], plan: list[Any], unused: bool = False) -> Result:
    model = adapted(base(), *names)
    model.set_adapter(plan[0]["active"])
    ddp = DistributedDataParallel(model, find_unused_parameters=unused)
    losses = train(model, ddp, plan, share_any, lambda: None)
    return losses, states(model)


def with_frozen_base() -> list[str]:
    """Names of base tensors that have a gradient after a step."""
    model = adapted(base(), "a", "b")
    replicas = Replicas(model)
    loss_of(model, share(batch(0))).backward()
    replicas.reduce()
    return [name for name, p in model.named_parameters() if p.grad is not None]


def ddp_then_switch() -> tuple[list[str], list[str]]:
    """Warnings after the switch, and after making it anew."""
    model = adapted(base(), "a", "b")
    DistributedDataParallel(model)
    found = []
    for _ in range(2):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always", MultigraftWarning)
            model.set_adapter("b")
        found.append([str(w.message) for w in seen if w.category is MultigraftWarning])
        DistributedDataParallel(model)
    return found[0], found[1]


def refused(how: str) -> str:
    """What making or using `Replicas` says where the ranks differ."""
    model = base()
    if how == "base" and rank():
        with torch.no_grad():
            model.lm_head.weight.add_(1)
    model = adapted(model, "a", "b") if how != "adapters" or not rank() else adapted(model, "a")
    try:
        replicas = Replicas(model)
        model.set_adapter(["a", "b"] if how == "active" and rank() else "a")
        loss_of(model, share(batch(0))).backward()
        replicas.reduce()
    except TrainingError as error:
        return str(error)
    return ""


def saved(folder: str) -> list[str]:
    """Files after all ranks save into one folder."""
    model = adapted(base(), "default", "b")
    Replicas(model)
    model.save_pretrained(folder, is_main_process=rank() == 0)
    torch.distributed.barrier()
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())


def added_later() -> tuple[list[float], list[float]]:
    """An adapter that every rank draws for itself, before and after `broadcast`."""
    model = adapted(base(), "a")
    replicas = Replicas(model)
    torch.manual_seed(rank())
    model.add_adapter("late", lora())
    before = float(next(model.roster.parameters("late")).sum())
    replicas.broadcast()
    after = float(next(model.roster.parameters("late")).sum())
    return [before], [after]
