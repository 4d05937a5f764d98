"""Beyond one process, on PyTorch's own engine. See ``docs/distributed.md`` for which when.

Replicas               data parallel: whole adapters on every rank, which step alike
shard                  FSDP2: a part of the frozen base on every rank
load_base, fill_base   such a base straight from its files
"""

from __future__ import annotations

from multigraft.distributed.fsdp import blocks_of, shard
from multigraft.distributed.loading import fill_base, load_base
from multigraft.distributed.replicas import Replicas

__all__ = ["Replicas", "blocks_of", "fill_base", "load_base", "shard"]
