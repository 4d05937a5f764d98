"""Beyond one process, on PyTorch's own engine. See ``docs/distributed.md`` for which when.

Replicas      data parallel: the whole model on every rank
"""

from __future__ import annotations

from multigraft.distributed.replicas import Replicas

__all__ = ["Replicas"]
