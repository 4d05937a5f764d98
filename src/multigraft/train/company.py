"""A run on several processes: how the base lies on them, and who makes the run.

Started by ``torchrun``; see `multigraft.distributed`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from multigraft.config import PeftConfig
from multigraft.errors import ConfigError, did_you_mean
from multigraft.model import PeftModel
from multigraft.train.crew import ALONE, Crew, Parted, Ranked
from multigraft.train.load import fetch, pick_device, pick_dtype
from multigraft.train.tasks import Task
from multigraft.train.tasks.causal_lm import CausalLM

if TYPE_CHECKING:
    from multigraft.distributed import Ranks

STRATEGIES = ("ddp", "fsdp", "tp")


@contextmanager
def launched(timeout: float, device: str) -> Iterator[Ranks | None]:
    """The processes that ``torchrun`` started, for the length of the block; None for one alone.

    Raises:
        ConfigError: there is no such device, or ``timeout`` is not positive.
        TrainingError: another process died, or did not answer in time.
    """
    if not timeout > 0:
        raise ConfigError(f"`timeout` (={timeout:g}) must be a positive number of seconds.")
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield None
        return
    from multigraft.distributed import together

    pick_device(device)  # an unknown one is told as everywhere
    with together(timeout, device) as ranks:
        yield ranks


def crew_of(model: PeftModel, ranks: Ranks | None, strategy: str) -> Crew:
    """Who makes the run of this model; the adapters get the first rank's values.

    Raises:
        TrainingError: the ranks do not hold the same base, or not the same adapters.
        UnsupportedError: an adapter is no low-rank pair, and layers lie in parts.
    """
    if ranks is None or ranks.size == 1:
        return ALONE
    from multigraft.distributed import Replicas, TensorParallel

    if strategy == "tp":
        return Parted(ranks, TensorParallel(model))
    return Ranked(ranks, Replicas(model))


def parted(source: str, task: Task, dtype: str, ranks: Ranks, quantize: str | None) -> nn.Module:
    """A base whose layers lie in parts on the ranks, by transformers' own plan.

    Raises:
        CheckpointError: there is none at ``source``.
        ConfigError: the task is another one, or the base is to be quantised.
    """
    if not isinstance(task, CausalLM) or quantize is not None:
        raise ConfigError(
            "`strategy` tp is for causal language models that are not quantised. Use ddp, or fsdp "
            "for other tasks."
        )
    from transformers import AutoConfig, AutoModelForCausalLM

    config = fetch(source, "model", AutoConfig.from_pretrained)
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if heads and heads % ranks.size:
            raise ConfigError(
                f"`strategy` tp: the model's `{name}` (={heads}) does not divide among "
                f"{ranks.size} processes. Start a number that it does, or use fsdp."
            )
    kind = pick_dtype(dtype, ranks.device)
    load = partial(AutoModelForCausalLM.from_pretrained, tp_plan="auto", dtype=kind)
    base: nn.Module = fetch(source, "model", load)
    return base.eval()


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


LAID = {"fsdp": sharded, "tp": parted}
"""How the base is loaded where it is not whole on each process."""


def check_strategy(strategy: str, configs: Sequence[PeftConfig]) -> None:
    """Fail when there is no such strategy, or it does not take these adapters.

    Raises:
        ConfigError: it does not.
    """
    if strategy not in STRATEGIES:
        raise ConfigError(
            f"`strategy` (={strategy!r}) must be one of {', '.join(STRATEGIES)}."
            f"{did_you_mean(strategy, STRATEGIES)}"
        )
    dropout = next((d for c in configs if (d := getattr(c, "lora_dropout", 0.0))), 0.0)
    if strategy == "tp" and dropout:
        raise ConfigError(
            f"`dropout` (={dropout:g}): `strategy` tp has none, since every process sees a part of "
            "the features. Set it to 0, or use ddp or fsdp."
        )
