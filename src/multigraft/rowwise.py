"""Low-rank changes of a plain weight, one block of rows after the other.

    W[rows] ← W[rows] + Σ scale · left[rows] right    left: (rows, rank)   right: (rank, columns)

Each block is widened, changed and rounded once while it is in the processor's cache: a float32
copy of the whole weight would go through memory several times, and would have to be got first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from multigraft.graft import Graft

BLOCK = 2**18
"""Elements of a block: a MiB of float32, which a core's own cache holds."""
LARGE_BLOCK = 2**26
"""The same on devices that are fast only on large blocks."""

Product = tuple[Tensor, Tensor, float]
"""Left and right factor of a change of the weight, and its scale."""


def products(grafts: Sequence[Graft], name: str) -> list[Product] | None:
    """What these grafts add to the tensor ``name``, as products; None where there is more to it."""
    found = []
    for graft in grafts:
        method, geometry = graft.method, graft.site.geometry
        is_plain = method.kind == "additive" and name == graft.site.key
        pair = method.low_rank(graft.params) if is_plain else None
        if pair is None or geometry is None:
            return None
        factors = geometry.matrices(graft.site.layer, pair[0], pair[1])
        if factors is None or type(factors[0].data) is not Tensor:  # sharded factors are no rows
            return None
        found.append((*factors, pair[2]))
    return found


@torch.no_grad()
def add_products(
    own: Tensor, into: Tensor, changes: Sequence[Product], check: Callable[[Tensor], None] | None
) -> None:
    """Write ``own`` with these changes into ``into``, accumulated in float32.

    Args:
        own: the values to start from ``(rows, columns)``; may be ``into`` itself.
        check: is shown each block before it is written, and may refuse it.
    """
    dtype = torch.float32
    size = BLOCK if own.device.type == "cpu" else LARGE_BLOCK
    rows = max(1, size // max(1, own.shape[1]))
    lefts = [left.to(dtype).split(rows) for left, _, _ in changes]
    rights = [right.to(dtype) for _, right, _ in changes]
    buffer = own.new_empty((min(rows, len(own)), own.shape[1]), dtype=dtype)
    for index, (block, target) in enumerate(zip(own.split(rows), into.split(rows), strict=True)):
        value = buffer[: len(block)].copy_(block)
        for left, right, (_, _, scale) in zip(lefts, rights, changes, strict=True):
            value.addmm_(left[index], right, alpha=scale)
        if check is not None:
            check(value)
        target.copy_(value)
