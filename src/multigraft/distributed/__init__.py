"""Beyond one process, on PyTorch's own engine. See ``docs/distributed.md`` for which when.

together               the processes that torchrun started, as a block
Replicas               data parallel: whole adapters on every rank, which step alike
shard                  FSDP2: a part of the frozen base on every rank
load_base, fill_base   such a base straight from its files
save_sharded, …        a run's state, for any number of ranks
"""

from __future__ import annotations

from multigraft.distributed.checkpoints import has_sharded, load_sharded, save_sharded
from multigraft.distributed.fsdp import blocks_of, shard
from multigraft.distributed.loading import fill_base, load_base
from multigraft.distributed.replicas import Replicas
from multigraft.distributed.stages import keep_stage, load_stages, save_stages
from multigraft.distributed.tensor_parallel import TensorParallel
from multigraft.distributed.together import Ranks, together

__all__ = [
    "Ranks",
    "Replicas",
    "TensorParallel",
    "blocks_of",
    "fill_base",
    "has_sharded",
    "keep_stage",
    "load_base",
    "load_sharded",
    "load_stages",
    "save_sharded",
    "save_stages",
    "shard",
    "together",
]
