"""Batches: padded tensors, and the order of examples as a function of the seed.

The order is no state: example ``i`` of a run follows from seed and ``i`` alone, so a run can be
taken up anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from multigraft.train.encode import IGNORED, Encoded

STRETCH = 50
"""How many batches are sorted by length together: enough to save padding, few enough to mix."""


FILL = {"labels": IGNORED}
"""What rows are filled up with where a wider batch takes them; everything else with zeros."""


@dataclass(frozen=True)
class Batch:
    """Examples as tensors, each with the rows as its first axis.

    Args:
        inputs: what the model is given: ids and mask, ``(rows, tokens)``, padded at the end.
        targets: what the loss needs besides: ``labels``, for causal language models ids that are
            learned and `IGNORED` elsewhere, ``(rows, tokens)``.
        tokens: how many are not padding.
    """

    inputs: dict[str, Tensor]
    targets: dict[str, Tensor]
    tokens: int

    @property
    def ids(self) -> Tensor:
        """Token ids, ``(rows, tokens)``."""
        return self.inputs["input_ids"]

    @property
    def labels(self) -> Tensor:
        """What is to be learned."""
        return self.targets["labels"]

    @property
    def rows(self) -> int:
        """How many there are."""
        return len(self.ids)

    @property
    def width(self) -> int:
        """Tokens of a row, padding counted."""
        return self.ids.shape[1]

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        inputs, targets = (
            {name: tensor.to(device) for name, tensor in group.items()}
            for group in (self.inputs, self.targets)
        )
        return Batch(inputs, targets, self.tokens)


def join(batches: Sequence[Batch], pad: int) -> Batch:
    """The rows of all these batches, one batch after another, as wide as the widest.

    Args:
        batches: of one task, so that all have the same tensors.
        pad: token id for padding.
    """
    if len(batches) == 1:
        return batches[0]
    fill = {**FILL, "input_ids": pad}
    inputs, targets = (
        {name: _stacked([g[name] for g in groups], fill.get(name, 0)) for name in groups[0]}
        for groups in ([b.inputs for b in batches], [b.targets for b in batches])
    )
    return Batch(inputs, targets, sum(b.tokens for b in batches))


def _stacked(tensors: Sequence[Tensor], fill: int) -> Tensor:
    if tensors[0].dim() == 1:
        return torch.cat(list(tensors))
    width = max(t.shape[1] for t in tensors)
    wide = [
        nn.functional.pad(t, (0, 0) * (t.dim() - 2) + (0, width - t.shape[1]), value=fill)
        for t in tensors
    ]
    return torch.cat(wide)


def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """Lists of token ids as ``(rows, tokens)``, filled up at the end."""
    width = max(len(row) for row in rows)
    out = torch.full((len(rows), width), fill)
    for at, row in enumerate(rows):
        out[at, : len(row)] = torch.tensor(list(row), dtype=torch.long)
    return out


def masked(rows: Sequence[Sequence[int]]) -> Tensor:
    """``(rows, tokens)``: 1 where `padded` has tokens of the rows, 0 elsewhere."""
    return padded([[1] * len(row) for row in rows], 0)


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
    tokens = sum(len(e.ids) for e in examples)
    return Batch({"input_ids": ids, "attention_mask": mask}, {"labels": labels}, tokens)


def collate_packed(rows: Sequence[Sequence[Encoded]], pad: int) -> Batch:
    """Rows of several examples each, of which none sees another; as wide as the longest row.

    Padding is examples of one token, of which nothing is learned; nor is anything learned of an
    example's first token, which the one before it would have to predict.

    Positions that begin again tell transformers where an example ends: it builds the block-diagonal
    mask itself, sliding windows included, but only where no mask is given.
    """
    joined = [
        Encoded(
            [token for example in row for token in example.ids],
            [flag for example in row for flag in (False, *example.learned[1:])],
        )
        for row in rows
    ]
    batch = collate(joined, pad)
    positions = torch.zeros_like(batch.ids)
    for number, row in enumerate(rows):
        places = torch.cat([torch.arange(len(example.ids)) for example in row])
        positions[number, : len(places)] = places
    return Batch({"input_ids": batch.ids, "position_ids": positions}, batch.targets, batch.tokens)


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
        return torch.randperm(self.count, generator=self._generator(number)).tolist()

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000_003 + number)


class GroupedOrder(Order):
    """An order whose batches hold examples of about the same length, so that little is padding.

    Each pass is shuffled, sorted by length within stretches of `STRETCH` batches, and its batches
    are shuffled again: every example comes once a pass, and which ones share a batch changes.

    Args:
        lengths: of the examples.
        seed: decides the order of every pass.
        batch_size: of the batches that will be cut from the order, from its start on.
    """

    def __init__(self, lengths: Sequence[int], seed: int, batch_size: int) -> None:
        super().__init__(len(lengths), seed)
        self.lengths = lengths
        self.batch_size = batch_size

    def _shuffled(self, number: int) -> list[int]:
        generator = self._generator(number)
        order = torch.randperm(self.count, generator=generator).tolist()
        # The last batch of the pass before takes its missing rows from this one.
        head = -(number * self.count) % self.batch_size
        first, rest = order[:head], order[head:]
        stretch = STRETCH * self.batch_size
        batches: list[list[int]] = []
        for start in range(0, len(rest), stretch):
            near = sorted(rest[start : start + stretch], key=lambda i: -self.lengths[i])
            batches += [
                near[at : at + self.batch_size] for at in range(0, len(near), self.batch_size)
            ]
        whole = [batch for batch in batches if len(batch) == self.batch_size]
        part = [batch for batch in batches if len(batch) < self.batch_size]
        mixed = torch.randperm(len(whole), generator=generator).tolist()
        return [*first, *(i for at in mixed for i in whole[at]), *(i for b in part for i in b)]
