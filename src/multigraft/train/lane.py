"""A lane: one adapter's training under way.

Whatever a step depends on is in the lane or follows from its step number: several lanes can
share one forward of the base, and a lane can be put down and taken up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from multigraft.errors import TrainingError
from multigraft.model import PeftModel
from multigraft.schedule import advance
from multigraft.train.batches import Batch, GroupedOrder, Order, collate, collate_packed
from multigraft.train.encode import Encoded
from multigraft.train.interrupt import uninterrupted
from multigraft.train.packing import pack
from multigraft.train.recipe import Recipe
from multigraft.train.store import lengths_of


class Lane:
    """An adapter's parameters, optimiser, schedule, and place in its data.

    Args:
        model: the model that has the adapter.
        adapter: its name.
        examples: what it learns from.
        recipe: how.
        pad: token id for padding.
        pack_to: tokens of a row that holds several examples; 0 gives each a row of its own.

    Raises:
        AdapterNameError: there is no such adapter.
        TrainingError: there are no examples, or nothing in the adapter can be trained.
    """

    def __init__(
        self,
        model: PeftModel,
        adapter: str,
        examples: Sequence[Encoded],
        recipe: Recipe,
        pad: int = 0,
        pack_to: int = 0,
    ) -> None:
        model.roster.require(adapter)
        if not examples:
            raise TrainingError(f"adapter `{adapter}` has no examples to learn from.")
        self.adapter = adapter
        self.roster = model.roster
        self.examples = examples
        self.recipe = recipe
        self.pad = pad
        self.step = 0
        lengths = lengths_of(examples)
        self.packs = pack(lengths, pack_to) if pack_to else None
        if self.packs is not None:
            lengths = [sum(lengths[i] for i in members) for members in self.packs]
        self.steps = recipe.total_steps(len(lengths))
        self.order = order_of(lengths, recipe)
        self.parameters = adapter_parameters(model, adapter)
        if not self.parameters:
            raise TrainingError(f"adapter `{adapter}` has no floating-point tensors to train.")
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=recipe.lr, weight_decay=recipe.weight_decay
        )

    @property
    def is_done(self) -> bool:
        """Whether every step has been made."""
        return self.step >= self.steps

    @property
    def lr(self) -> float:
        """The learning rate of the step that comes next."""
        return self.recipe.lr_at(self.step, self.steps)

    def batch(self) -> Batch:
        """The batch of the step that comes next."""
        size = self.recipe.batch_size
        rows = self.order.slice(self.step * size, size)
        if self.packs is None:
            return collate([self.examples[row] for row in rows], self.pad)
        packed = [[self.examples[i] for i in self.packs[row]] for row in rows]
        return collate_packed(packed, self.pad)

    def update(self) -> float:
        """One optimiser step on the gradients that are there; returns their norm before clipping.

        Ctrl-C waits until the step is whole.

        Raises:
            TrainingError: a gradient is not finite; the adapter was not changed.
        """
        limit = self.recipe.clip or float("inf")
        norm = float(nn.utils.clip_grad_norm_(self.parameters, limit))
        if norm != norm or norm == float("inf"):
            raise TrainingError(
                f"adapter `{self.adapter}`, step {self.step + 1} of {self.steps}: the gradient is "
                f"not finite. Lower the learning rate (={self.recipe.lr:g}), or train in float32."
            )
        with uninterrupted():
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr
            self.optimizer.step()
            advance(self.roster, self.step + 1)
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
        return norm


def order_of(lengths: Sequence[int], recipe: Recipe) -> Order:
    """The order of rows of these lengths."""
    if recipe.group_by_length:
        return GroupedOrder(lengths, recipe.seed, recipe.batch_size)
    return Order(len(lengths), recipe.seed)


def adapter_parameters(model: PeftModel, adapter: str) -> list[nn.Parameter]:
    """The adapter's own trainable tensors, each once, by ownership rather than by name."""
    own = model.roster.parameters(adapter)
    return list({id(p): p for p in own if p.is_floating_point()}.values())
