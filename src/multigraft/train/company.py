"""A run on several processes: how the base lies on them, and who makes the run.

Started by ``torchrun``; see `multigraft.distributed`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

from multigraft.errors import ConfigError
from multigraft.model import PeftModel
from multigraft.train.crew import ALONE, Crew, Ranked
from multigraft.train.load import pick_device, pick_dtype
from multigraft.train.tasks import Task
from multigraft.train.tasks.causal_lm import CausalLM

if TYPE_CHECKING:
    from multigraft.distributed import Ranks

STRATEGIES = ("ddp", "fsdp")


@contextmanager
def launched(timeout: float, device: str) -> Iterator[Ranks | None]:
    """The processes that ``torchrun`` started, for the length of the block; None for one alone.

    Raises:
        ConfigError: there is no such device, or ``timeout`` is not positive.
        TrainingError: another process died, or did not answer in time.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield None
        return
    from multigraft.distributed import together

    pick_device(device)  # an unknown one is told as everywhere
    with together(timeout, device) as ranks:
        yield ranks


def crew_of(model: PeftModel, ranks: Ranks | None) -> Crew:
    """Who makes the run of this model; the adapters get the first rank's values.

    Raises:
        TrainingError: the ranks do not hold the same base, or not the same adapters.
    """
    if ranks is None or ranks.size == 1:
        return ALONE
    from multigraft.distributed import Replicas

    return Ranked(ranks, Replicas(model))


def sharded(source: str, task: Task, dtype: str, ranks: Ranks, quantize: str | None) -> nn.Module:
    """A base of which each rank holds a part.

    Causal language models are read in parts, so that no rank ever holds the whole; those of other
    tasks, which may get a new head, are read whole by each and then divided.

    Raises:
        CheckpointError: there is none of this kind at ``source``.
        ConfigError: the base is to be quantised, which FSDP2 does not divide.
    """
    from multigraft.distributed import load_base, shard

    if quantize is not None:
        raise ConfigError(
            f"`strategy` fsdp does not divide quantised weights (`quantize`={quantize!r}). Use "
            "ddp, which keeps a quantised base on each process, or leave `quantize` out."
        )
    kind = pick_dtype(dtype, ranks.device)
    if isinstance(task, CausalLM):
        return load_base(source, dtype=None if isinstance(kind, str) else kind)
    base = task.load(source, dtype=dtype, device=str(ranks.device))
    shard(base)
    return base
