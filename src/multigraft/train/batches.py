"""Batches: padded tensors, and the order of examples as a function of the seed.

The order is no state: example ``i`` of a run follows from seed and ``i`` alone, so a run can be
taken up anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from multigraft.train.encode import IGNORED, Encoded


@dataclass(frozen=True)
class Batch:
    """Examples, padded at the end.

    Args:
        ids: token ids, ``(rows, tokens)``.
        mask: 1 where there is a token, 0 on padding, ``(rows, tokens)``.
        labels: ids that are learned, `IGNORED` elsewhere, ``(rows, tokens)``.
        tokens: how many are not padding.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor
    tokens: int

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        ids, mask, labels = (t.to(device) for t in (self.ids, self.mask, self.labels))
        return Batch(ids, mask, labels, self.tokens)


def collate(examples: Sequence[Encoded], pad: int) -> Batch:
    """Examples as one batch, as wide as the longest."""
    width = max(len(e.ids) for e in examples)
    ids = torch.full((len(examples), width), pad)
    labels = torch.full((len(examples), width), IGNORED)
    mask = torch.zeros(len(examples), width, dtype=torch.long)
    for row, example in enumerate(examples):
        length = len(example.ids)
        ids[row, :length] = torch.tensor(example.ids)
        labels[row, :length] = torch.tensor(example.labels)
        mask[row, :length] = 1
    return Batch(ids, mask, labels, sum(len(e.ids) for e in examples))


class Order:
    """An endless sequence of indices: pass after pass, each in an order of its own.

    Args:
        count: number of examples.
        seed: decides the order of every pass.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.seed = seed
        self._pass = lru_cache(maxsize=2)(self._shuffled)

    def __getitem__(self, position: int) -> int:
        number, place = divmod(position, self.count)
        return self._pass(number)[place]

    def slice(self, start: int, length: int) -> list[int]:
        """``length`` indices from position ``start`` on."""
        return [self[p] for p in range(start, start + length)]

    def _shuffled(self, number: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        return torch.randperm(self.count, generator=generator).tolist()
