"""A lane: one adapter's training under way.

Whatever a step depends on is in the lane or follows from its step number: several lanes share the
forwards of one base, and a lane can be put down and taken up with the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from multigraft.errors import CheckpointError, TrainingError
from multigraft.methods import METHODS, Schedule
from multigraft.model import PeftModel
from multigraft.schedule import advance
from multigraft.train import optimizer
from multigraft.train.batches import Batch, GroupedOrder, Order, collate_packed
from multigraft.train.crew import ALONE, Crew
from multigraft.train.optimizer import alike
from multigraft.train.packing import pack
from multigraft.train.recipe import Recipe
from multigraft.train.seeding import mixed_seed
from multigraft.train.store import lengths_of
from multigraft.train.tasks import Task
from multigraft.train.tasks.causal_lm import CausalLM
from multigraft.whole import fill, full_shape, is_parted, whole


@dataclass
class Part:
    """A part of an adapter's step.

    Args:
        batch: what this process learns from.
        whole: the batch of all processes.
        first: the place in it of this process's first row.
        weight: 0 where another process learns from these rows too, else 1.
    """

    lane: Lane
    number: int
    batch: Batch
    whole: Batch
    first: int = 0
    weight: float = 1.0


class Lane:
    """An adapter's parameters, optimiser, schedule, and place in its data.

    Args:
        model: the model that has the adapter.
        adapter: its name.
        examples: what it learns from.
        recipe: how.
        pad: token id for padding.
        pack_to: tokens of a row that holds several examples; 0 gives each a row of its own.
        task: what an example is, and the loss.

    Raises:
        AdapterNameError: there is no such adapter.
        TrainingError: there are no examples, or nothing in the adapter can be trained.
    """

    def __init__(
        self,
        model: PeftModel,
        adapter: str,
        examples: Sequence[Any],
        recipe: Recipe,
        pad: int = 0,
        pack_to: int = 0,
        task: Task | None = None,
    ) -> None:
        model.roster.require(adapter)
        if not examples:
            raise TrainingError(f"adapter `{adapter}` has no examples to learn from.")
        self.adapter = adapter
        self.roster = model.roster
        self.examples = examples
        self.recipe = recipe
        self.task = task or CausalLM()
        self.pad = pad
        self.step = 0
        self.losses: list[float] = []
        """Of every step."""
        self.tokens = 0
        """Tokens seen so far, padding not counted."""
        lengths = lengths_of(examples)
        self.packs = pack(lengths, pack_to) if pack_to else None
        if self.packs is not None:
            lengths = [sum(lengths[i] for i in members) for members in self.packs]
        self.steps = recipe.total_steps(len(lengths))
        self.order = order_of(lengths, recipe)
        self.parameters = adapter_parameters(model, adapter)
        if not self.parameters:
            raise TrainingError(f"adapter `{adapter}` has no floating-point tensors to train.")
        self.optimizer = optimizer.make(
            recipe.optimizer,
            self.parameters,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            options=recipe.optimizer_options,
        )

    @property
    def is_done(self) -> bool:
        """Whether every step has been made."""
        return self.step >= self.steps

    @property
    def lr(self) -> float:
        """The learning rate of the step that comes next."""
        return self.recipe.lr_at(self.step, self.steps)

    def parts(self, crew: Crew = ALONE) -> list[Part]:
        """What the step that comes next learns from, in parts that run one after another.

        Args:
            crew: of whose batches this process takes its share.
        """
        size, number = self.recipe.batch_size, self.recipe.accumulate
        found = []
        for n in range(number):
            rows = self.order.slice((self.step * number + n) * size, size)
            whole = self._collated(rows)
            own, first = crew.share(rows)
            batch = whole if len(own) == len(rows) else self._collated(own)
            weight = float(crew.takes(len(rows)))
            first = first * whole.rows // len(rows)  # an example may be several rows of a batch
            found.append(Part(self, n, batch, whole, first, weight))
        return found

    def _collated(self, rows: Sequence[int]) -> Batch:
        if self.packs is None:
            return self.task.collate([self.examples[row] for row in rows], self.pad)
        packed = [[self.examples[i] for i in self.packs[row]] for row in rows]
        return collate_packed(packed, self.pad)

    def seed(self, part: int) -> int:
        """What the random numbers of a part of the next step follow from."""
        return mixed_seed(self.recipe.seed, self.step, part)

    def norm(self) -> Tensor:
        """The norm of all gradients that are there, a scalar on their device."""
        found = [
            whole(nn.utils.get_total_norm([p.grad for p in own if p.grad is not None]))
            for own in alike(self.parameters)
        ]
        return found[0] if len(found) == 1 else torch.linalg.vector_norm(torch.stack(found))

    def check(self, norm: float) -> None:
        """Fail when the gradient is not finite.

        Raises:
            TrainingError: names the adapter and the step; the adapter was not changed.
        """
        if norm != norm or norm == float("inf"):
            raise TrainingError(
                f"adapter `{self.adapter}`, step {self.step + 1} of {self.steps}: the gradient is "
                f"not finite. Lower the learning rate (={self.recipe.lr:g}), or train in float32."
            )

    def update(self, norm: Tensor, loss: float, tokens: int) -> None:
        """One step of the optimiser on the gradients that are there, and the next step is due.

        Args:
            norm: theirs.
            loss, tokens: of what they are from.
        """
        for own in alike(self.parameters) if self.recipe.clip else ():
            nn.utils.clip_grads_with_norm_(own, self.recipe.clip, norm)
        for group in self.optimizer.param_groups:
            # Groups that learn faster than the recipe says do so by the same factor throughout.
            share = group.setdefault("share", group["lr"] / self.recipe.lr)
            group["lr"] = self.lr * share
        self.optimizer.step()
        advance(self.roster, self.step + 1, [self.adapter])
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.losses.append(loss)
        self.tokens += tokens

    def drop_gradients(self) -> None:
        """Forget what the last backward passes gave."""
        self.optimizer.zero_grad(set_to_none=True)

    def values(self) -> list[Tensor]:
        """Copies of the adapter's tensors as they are now, on the CPU."""
        return [whole(p.detach()).to("cpu", copy=True) for p in self.parameters]

    @torch.no_grad()
    def take(self, values: Sequence[Tensor]) -> None:
        """Give the adapter's tensors these values."""
        for parameter, value in zip(self.parameters, values, strict=True):
            fill(parameter, value.to(parameter))

    def _numbered(self, number: int) -> nn.Parameter:
        """The parameter that the optimiser knows by this number."""
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        found: nn.Parameter = held[number]
        return found

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything the next steps depend on: tensors by name, and values that JSON holds."""
        tensors = {f"parameter.{n}": whole(p.detach()) for n, p in enumerate(self.parameters)}
        plain: dict[str, dict[str, Any]] = {}
        # As it is, not as `state_dict` wraps it: bitsandbytes puts a mapping around its tensors.
        held = (p for group in self.optimizer.param_groups for p in group["params"])
        for n, parameter in enumerate(held):
            for name, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{n}.{name}"] = whole(value)
                else:
                    plain.setdefault(str(n), {})[name] = value
        values: dict[str, Any] = {
            "step": self.step,
            "tokens": self.tokens,
            "losses": self.losses,
            "optimizer": plain,
        }
        schedule = self.roster.schedules.get(self.adapter)
        if schedule is not None:
            more, values["schedule"] = schedule.state()
            tensors |= {f"schedule.{name}": tensor for name, tensor in more.items()}
        return tensors, values

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go on from what `state` gave.

        Raises:
            CheckpointError: it is another adapter's; nothing was changed.
        """
        own = [tensors.get(f"parameter.{n}") for n in range(len(self.parameters))]
        fits = [
            t is not None and t.shape == p.shape for t, p in zip(own, self.parameters, strict=True)
        ]
        if not all(fits):
            raise CheckpointError(
                f"adapter `{self.adapter}`: the checkpoint holds tensors of other shapes. Resume "
                "with the base, the rank and the targets that the run began with."
            )
        self.take([t for t in own if t is not None])
        whole = self.optimizer.state_dict()
        entries: dict[int, dict[str, Any]] = {}
        for key, tensor in tensors.items():
            if key.startswith("optimizer."):
                _, n, name = key.split(".", 2)
                entries.setdefault(int(n), {})[name] = _laid(tensor, self._numbered(int(n)))
        for n, plain in values["optimizer"].items():
            entries.setdefault(int(n), {}).update(plain)
        self.optimizer.load_state_dict({**whole, "state": entries})
        if "schedule" in values:
            schedule = _schedule_of(self)
            device = self.parameters[0].device
            more = {
                key.removeprefix("schedule."): tensor.to(device)
                for key, tensor in tensors.items()
                if key.startswith("schedule.")
            }
            schedule.restore(more, values["schedule"])
        self.step, self.tokens = values["step"], values["tokens"]
        self.losses = list(values["losses"])


def _laid(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """A tensor of the optimiser, in parts where its parameter is."""
    if not is_parted(parameter) or tuple(value.shape) != full_shape(parameter):
        return value
    held = torch.zeros_like(parameter, dtype=value.dtype, requires_grad=False)
    fill(held, value)
    return held


def _schedule_of(lane: Lane) -> Schedule:
    """What changes the adapter besides the optimiser; its state is about to be restored."""
    config = lane.roster.configs[lane.adapter]
    made = METHODS[str(config.peft_type)].schedule(config)
    assert made is not None  # it had a state to keep
    return lane.roster.schedules.setdefault(lane.adapter, made)


def order_of(lengths: Sequence[int], recipe: Recipe) -> Order:
    """The order of rows of these lengths."""
    if recipe.group_by_length:
        return GroupedOrder(lengths, recipe.seed, recipe.batch_size)
    return Order(len(lengths), recipe.seed)


def adapter_parameters(model: PeftModel, adapter: str) -> list[nn.Parameter]:
    """The adapter's own trainable tensors, each once, by ownership rather than by name."""
    own = model.roster.parameters(adapter)
    return list({id(p): p for p in own if p.is_floating_point()}.values())
