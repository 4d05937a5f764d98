"""Joining the processes that ``torchrun`` started, and ending clearly when one of them is lost.

    with together(timeout=300) as ranks:
        ...                                 # ranks.rank of ranks.size, on ranks.device

Started by itself, the same script is the only process of one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from multigraft.errors import ConfigError, TrainingError

TIMEOUT = 600.0
"""Seconds after which a rank that does not answer is given up."""
LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out",
    "timed out",
    "timeout",
    "NCCL communicator was aborted",
    "remote process exited",
)
"""How the backends say that another process is gone, or hangs."""

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, seen from one of them.

    Args:
        rank: which one this is.
        size: how many there are.
        device: what this one computes on.
        restarts: how often torchrun has started them again.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    restarts: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is the one that reports and writes."""
        return self.rank == 0


@contextmanager
def together(timeout: float = TIMEOUT, device: str = "auto") -> Iterator[Ranks]:
    """Join the other processes for the length of the block.

    Args:
        timeout: seconds after which one that does not answer ends the run.
        device: ``"auto"`` for an accelerator of its own for each process where there are any.

    Raises:
        ConfigError: ``timeout`` is not positive.
        TrainingError: another process died, or did not answer in time.
    """
    if timeout <= 0:
        raise ConfigError(f"`timeout` (={timeout:g}) must be a positive number of seconds.")
    place = _device(device)
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield Ranks(device=place)
        return
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    try:
        _join(place, restarts, timedelta(seconds=timeout))
        yield Ranks(dist.get_rank(), dist.get_world_size(), place, restarts)
    except RuntimeError as error:
        if not is_loss(error):
            raise
        rank = os.environ["RANK"]
        raise TrainingError(
            f"rank {rank}: another process was lost, or did not answer within {timeout:g} s "
            f"({_first_line(error)}). Its own output says why. The last checkpoint is whole: start "
            "again from it, or let torchrun do so (--max-restarts)."
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def is_loss(error: BaseException) -> bool:
    """Whether an error says that another process is gone."""
    text = str(error)
    is_ours = isinstance(error, TrainingError)
    return not is_ours and any(phrase in text for phrase in LOST)


def _join(place: torch.device, restarts: int, timeout: timedelta) -> None:
    """Make the process group, under keys that no earlier attempt has left in the store.

    torchrun keeps its store when it starts processes again, and in it are the addresses of those
    that are gone: the new ones would try to reach them.
    """
    store, rank, size = next(iter(rendezvous("env://", timeout=timeout)))
    attempt = (store.add(f"multigraft/{restarts}", 1) - 1) // size
    store = dist.PrefixStore(f"multigraft/{restarts}/{attempt}", store)  # type: ignore[attr-defined]
    backend = "gloo" if place.type == "cpu" else None
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def _device(name: str) -> torch.device:
    accelerator = torch.accelerator.current_accelerator() if name == "auto" else None
    if accelerator is None or not torch.accelerator.is_available():
        return torch.device("cpu" if name == "auto" else name)
    place = torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")))
    torch.accelerator.set_device_index(place.index)
    return place


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
