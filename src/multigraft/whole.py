"""Tensors that lie in parts on several processes: whole ones, where values or shapes are needed.

FSDP2 and tensor parallelism have `DTensor`; DeepSpeed's ZeRO-3 leaves an empty tensor in the model
and notes on it what it stands for (``ds_id``, ``ds_shape``). Putting one together takes all
processes: each must ask for the same tensors in the same order.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from multigraft.errors import CheckpointError
from multigraft.registry import TypeRegistry

PARTED: TypeRegistry[Callable[[Any], Tensor]] = TypeRegistry("tensor in parts")
"""What makes a whole one of a tensor, by its type."""


@PARTED.register("torch.distributed.tensor.DTensor", "torch.distributed.tensor._api.DTensor")
def _joined(tensor: Any) -> Tensor:
    joined: Tensor = tensor.full_tensor()
    return joined


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of it when it lies in parts.

    Raises:
        CheckpointError: DeepSpeed keeps it, and is not there to give it.
    """
    join = PARTED.find(type(tensor))
    if join is not None:
        return join(tensor)
    if is_kept_by_deepspeed(tensor):
        with gathered([tensor]):
            return tensor.detach().clone()
    return tensor


def is_parted(tensor: Tensor) -> bool:
    """Whether a process holds a part of it alone."""
    return is_kept_by_deepspeed(tensor) or PARTED.find(type(tensor)) is not None


def is_kept_by_deepspeed(tensor: Tensor) -> bool:
    """Whether it is one of ZeRO-3's, gathered now or not."""
    return hasattr(tensor, "ds_id")


def full_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of the whole."""
    shape = getattr(tensor, "ds_shape", tensor.shape) if hasattr(tensor, "ds_id") else tensor.shape
    return tuple(shape)


@torch.no_grad()
def fill(tensor: Tensor, value: Tensor) -> None:
    """Give a tensor these values, the whole ones; of a tensor in parts, each process its own."""
    if PARTED.find(type(tensor)) is None:
        tensor.copy_(value)
        return
    from torch.distributed.tensor import distribute_tensor

    own: Any = tensor
    moved = value.to(device=own.to_local().device, dtype=own.dtype)
    part: Any = distribute_tensor(moved, own.device_mesh, own.placements, src_data_rank=None)
    own.to_local().copy_(part.to_local())


@contextmanager
def gathered(tensors: Iterable[Tensor], writes: bool = False) -> Iterator[None]:
    """Let those of the tensors that ZeRO-3 keeps have all their values inside the block.

    Args:
        writes: what the block writes into them stays, as the first process has it.

    Raises:
        CheckpointError: DeepSpeed keeps some, and is not there to give them.
    """
    kept = list({id(t): t for t in tensors if is_kept_by_deepspeed(t)}.values())
    if not kept:
        yield
        return
    with _deepspeed().GatheredParameters(kept, modifier_rank=0 if writes else None):
        yield


@contextmanager
def present(module: nn.Module, writes: bool = False) -> Iterator[None]:
    """The same for every tensor of a module."""
    with gathered(module.parameters(), writes):
        yield


def main_rank() -> bool:
    """Whether this process is the first of all, or the only one."""
    dist = torch.distributed
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def wait_for_all() -> None:
    """Wait until every process has come here."""
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def _deepspeed() -> Any:
    """The part of DeepSpeed that gathers.

    Raises:
        CheckpointError: it cannot be imported, or is older than ZeRO-3.
    """
    try:
        zero = importlib.import_module("deepspeed").zero
        zero.GatheredParameters  # noqa: B018 - ancient ones have none
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            "the model's tensors are DeepSpeed's (ZeRO-3), each process has a part of them, and "
            f"deepspeed.zero.GatheredParameters is not to be had ({error}). Install the deepspeed "
            "that partitioned the model; nothing was written or changed."
        ) from error
    return zero
