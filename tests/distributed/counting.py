"""Collectives, counted as they are called."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NAMES = {
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "broadcast_": "broadcast",
}


class Collectives(TorchDispatchMode):
    """How often each kind is called in the block, and how many bytes the largest operand has."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.sizes: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name = NAMES.get(func._opname)
            if name is not None:
                given = tree_leaves((args, kwargs or {}))
                size = max(t.nbytes for t in given if isinstance(t, Tensor))
                self.calls[name] += 1
                self.bytes[name] += size
                self.sizes.append((name, size))
        return func(*args, **(kwargs or {}))
