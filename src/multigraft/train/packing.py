"""Packing: several examples in one row, so that less of a batch is padding; none sees another."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import torch
from torch import nn

from multigraft.errors import TrainingError
from multigraft.train.batches import collate, collate_packed
from multigraft.train.encode import Encoded

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""How far logits may be apart, as a share of the largest; half precision has `HALF`."""
HALF = 0.1


def pack(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Examples by number in rows of up to ``size`` tokens: the longest first, where it fits best.

    The same lengths give the same rows. One that is longer than ``size`` has a row to itself.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # sorted: free tokens, number of the row
    for example in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[example]
        at = bisect_left(room, (length, -1))
        if at == len(room):
            free, row = size, len(rows)
            rows.append([])
        else:
            free, row = room.pop(at)
        rows[row].append(example)
        if free > length:
            insort(room, (free - length, row))
    return rows


def check_packing(model: nn.Module, examples: Sequence[Encoded], pad: int = 0) -> None:
    """Find out whether this model keeps the examples of a row apart.

    Two examples are run in one row and each alone. Models whose memory runs along the row (Mamba,
    linear attention), or whose attention reads no positions, fail.

    Raises:
        TrainingError: the logits differ.
    """
    if not examples:
        return
    two = [examples[0], examples[-1]]
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            # Two rows: a row that is alone may be treated unlike one among others.
            packed = collate_packed([two, two], pad).to(device)
            together = model(**packed.inputs, use_cache=False).logits[1, -packed.ids.shape[1] :]
            alone = [_alone(model, one, pad, device) for one in two]
    finally:
        model.train(was_training)
    apart = torch.cat(alone)
    limit = TOLERANCE.get(apart.dtype, HALF) * float(apart.abs().max())
    difference = float((together - apart).abs().max())
    if not difference <= limit:
        raise TrainingError(
            f"packing: in one row with another example, an example's logits change by "
            f"{difference:.2g} on this model, so examples would leak into each other. Train "
            "without packing; grouping by length also saves padding."
        )


def _alone(model: nn.Module, one: Encoded, pad: int, device: torch.device) -> torch.Tensor:
    batch = collate([one], pad).to(device)
    return model(**batch.inputs, use_cache=False).logits[0, -batch.ids.shape[1] :]
