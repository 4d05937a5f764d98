"""What ZeRO-3 does to a model's tensors, and how they are had: a stand-in for DeepSpeed.

Names and behaviour that matter here are those of deepspeed.zero: ``ds_id``, ``ds_shape``,
``ds_numel`` and ``ds_status`` on parameters whose ``data`` is empty, tables of parameters that
fetch what is indexed in them during a forward, hooks of modules, and `GatheredParameters`.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

_ids = count()


class Table(dict):
    """The parameters of one module; a look-up with ``get`` gives an empty one."""

    in_forward = False

    def __getitem__(self, name: str) -> Any:
        parameter = super().__getitem__(name)
        if Table.in_forward and parameter is not None and is_away(parameter):
            fetch(parameter)
        return parameter


def is_away(parameter: Any) -> bool:
    return getattr(parameter, "ds_status", "") == "NOT_AVAILABLE"


def partition(model: nn.Module) -> None:
    """Leave each process a part of every parameter."""
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and not hasattr(parameter, "ds_id"):
                parameter.ds_id = next(_ids)
                parameter.ds_shape, parameter.ds_numel = parameter.shape, parameter.numel()
                send_away(parameter)
        if type(module._parameters) is dict:
            module._parameters = Table(module._parameters)
            module.register_forward_pre_hook(_fetch_own)


def _fetch_own(module: nn.Module, args: Any) -> None:
    for parameter in module._parameters.values():
        if parameter is not None and is_away(parameter):
            fetch(parameter)


def send_away(parameter: Any) -> None:
    size, rank = dist.get_world_size(), dist.get_rank()
    each = -(-parameter.ds_numel // size)
    flat = torch.zeros(each * size, dtype=parameter.dtype)
    flat[: parameter.ds_numel] = parameter.data.reshape(-1)
    parameter.ds_tensor = flat[rank * each : (rank + 1) * each].clone()
    parameter.data = torch.empty(0, dtype=parameter.dtype)
    parameter.ds_status = "NOT_AVAILABLE"


def fetch(parameter: Any) -> None:
    parts = [torch.empty_like(parameter.ds_tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, parameter.ds_tensor)
    parameter.data = torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)
    parameter.ds_status = "AVAILABLE"


@contextmanager
def GatheredParameters(params: Any, modifier_rank: int | None = None) -> Iterator[None]:
    """Whole ones inside the block; what ``modifier_rank`` writes there stays."""
    away = [p for p in params if is_away(p)]
    for parameter in away:
        fetch(parameter)
    try:
        yield
    finally:
        for parameter in away:
            if modifier_rank is not None:
                own = parameter.data.contiguous()
                dist.broadcast(own, modifier_rank)
                parameter.data = own
                send_away(parameter)
            else:  # what was written is lost
                parameter.data = torch.empty(0, dtype=parameter.dtype)
                parameter.ds_status = "NOT_AVAILABLE"


@contextmanager
def step(model: nn.Module) -> Iterator[None]:
    """The engine's forward and backward; parameters go away again after it."""
    Table.in_forward = True
    try:
        yield
    finally:
        Table.in_forward = False
        for parameter in model.parameters():
            if not is_away(parameter):
                send_away(parameter)


@contextmanager
def installed(is_ancient: bool = False) -> Iterator[None]:
    """As the module ``deepspeed``; an ancient one has no ZeRO-3."""
    module = types.ModuleType("deepspeed")
    if not is_ancient:
        module.zero = types.SimpleNamespace(GatheredParameters=GatheredParameters)  # type: ignore[attr-defined]
    before = sys.modules.get("deepspeed")
    sys.modules["deepspeed"] = module
    try:
        yield
    finally:
        del sys.modules["deepspeed"]
        if before is not None:
            sys.modules["deepspeed"] = before
