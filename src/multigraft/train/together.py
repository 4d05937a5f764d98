"""One step of several adapters: their rows share every forward and backward of the base.

    rows of a, b, c ──> one batch, each row naming its adapter ──> base ──> losses by row
                                                                              │
          update of each by its own optimiser <── own gradients <── sum of the adapters' mean losses

The rows of one adapter never see another's, and each loss is the mean over its own rows, so each
adapter gets the gradients that it would get alone, to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from multigraft.errors import RoutingError, StateError, TrainingError
from multigraft.model import PeftModel
from multigraft.schedule import penalties
from multigraft.train.batches import join
from multigraft.train.crew import ALONE, Crew
from multigraft.train.drawing import drawing
from multigraft.train.interrupt import uninterrupted
from multigraft.train.lane import Lane, Part
from multigraft.train.seeding import seeded

MOST_PADDING = 1.25
"""A batch may be joined while it has at most so many times the tokens of its parts."""


@dataclass(frozen=True)
class Stepped:
    """What a step of one adapter came to.

    Args:
        loss: mean over what was learned from, before the update.
        error: why the adapter was not changed, if it was not.
    """

    loss: float
    lr: float
    grad_norm: float
    error: TrainingError | None = None


def step(model: PeftModel, lanes: Sequence[Lane], crew: Crew = ALONE) -> list[Stepped]:
    """One step of each of these adapters; what they came to, in their order.

    One whose loss or gradient is not finite is left as it was, and the others go on. Ctrl-C finds
    all of them updated, or none.

    Args:
        crew: the processes that make it.

    Raises:
        TrainingError: the device is out of memory; nothing was changed.
    """
    parts = [lane.parts(crew) for lane in lanes]
    counts = {
        lane.adapter: max(1, sum(lane.task.count(part.whole) for part in own))
        for lane, own in zip(lanes, parts, strict=True)
    }
    rates = [lane.lr for lane in lanes]
    losses = {lane.adapter: 0.0 for lane in lanes}
    errors: dict[str, TrainingError] = {}
    try:
        for number in range(max(len(own) for own in parts)):
            now = [p[number] for p in parts if number < len(p) and p[0].lane.adapter not in errors]
            for company in companies(model, now):
                for name, loss in _gradients(model, company, counts, errors, crew).items():
                    losses[name] += loss
        crew.reduce(lane for lane in lanes if lane.adapter not in errors)
        return _updated(lanes, parts, rates, losses, errors)
    except BaseException:
        for lane in lanes:
            lane.drop_gradients()
        raise


def companies(model: PeftModel, parts: Sequence[Part]) -> list[list[Part]]:
    """Which of these parts run as one batch.

    Apart stay those that cannot be routed or learn another task, and rows so much longer than the
    others that most of the batch would be padding.
    """
    together: list[list[Part]] = []
    for part in sorted(parts, key=lambda p: -p.whole.width):  # stable: those of one width in order
        for company in together if _is_routable(model, part.lane) else ():
            if _fit(model, [*company, part]):
                company.append(part)
                break
        else:
            together.append([part])
    return together


def _fit(model: PeftModel, parts: Sequence[Part]) -> bool:
    first = parts[0]
    if not _is_routable(model, first.lane) or first.lane.task != parts[-1].lane.task:
        return False
    if first.batch.inputs.keys() != parts[-1].batch.inputs.keys():
        return False
    # Of the whole batches, so that all processes decide alike.
    own = sum(p.whole.rows * p.whole.width for p in parts)
    return sum(p.whole.rows for p in parts) * first.whole.width <= MOST_PADDING * own


def _is_routable(model: PeftModel, lane: Lane) -> bool:
    try:
        model.roster.check_batchable(lane.adapter)
    except RoutingError:
        return False
    return True


def _gradients(
    model: PeftModel,
    company: list[Part],
    counts: Mapping[str, int],
    errors: dict[str, TrainingError],
    crew: Crew,
) -> dict[str, float]:
    """Give the adapters of these parts their gradients; each one's share of its step's loss."""
    while company:
        with _enough_memory(company):
            terms = _losses(model, company, counts)
            values = crew.sums(torch.stack([term.detach() for term in terms]))
            broken = [not abs(value) < float("inf") for value in values]
            if not any(broken):
                loss = torch.stack(terms).sum()
                for part in company:
                    for term in penalties(model.roster, [part.lane.adapter]):
                        parts = part.lane.recipe.accumulate * crew.size
                        loss = loss + term.to(loss.device) / parts
                loss.backward()
                return {p.lane.adapter: v for p, v in zip(company, values, strict=True)}
        # What is not finite could reach the others through sums: they run again without it.
        for part, value, is_broken in zip(company, values, broken, strict=True):
            if is_broken:
                errors[part.lane.adapter] = _not_finite(part.lane, value)
        company = [p for p, is_broken in zip(company, broken, strict=True) if not is_broken]
    return {}


def _losses(model: PeftModel, company: Sequence[Part], counts: Mapping[str, int]) -> list[Tensor]:
    """Each part's share of its step's loss, a scalar each."""
    lanes = [part.lane for part in company]
    device = lanes[0].parameters[0].device
    batch = join([part.batch for part in company], lanes[0].pad).to(device)
    task = lanes[0].task
    names = [part.lane.adapter for part in company for _ in range(part.batch.rows)]
    seed = lanes[0].seed(company[0].number)
    if len(company) == 1:
        _activate(model, lanes[0].adapter)
    with torch.no_grad(), seeded(seed, device):
        batch = task.prepare(model, batch)
    with seeded(seed, device), drawing(company):
        routed = {} if len(company) == 1 else {"adapter_names": names}
        outputs = model(**batch.inputs, **task.call, **routed)
    rows = task.losses(outputs, batch)
    each = rows.split([part.batch.rows for part in company])
    return [
        own.sum() * (part.weight / counts[part.lane.adapter])
        for own, part in zip(each, company, strict=True)
    ]


def _activate(model: PeftModel, adapter: str) -> None:
    """Let the adapter act on whole batches; which tensors train is not touched."""
    if model.roster.active != (adapter,):
        model.roster.set_active([adapter])


def _updated(
    lanes: Sequence[Lane],
    parts: Sequence[Sequence[Part]],
    rates: Sequence[float],
    losses: dict[str, float],
    errors: dict[str, TrainingError],
) -> list[Stepped]:
    norms = {lane.adapter: lane.norm() for lane in lanes if lane.adapter not in errors}
    # One wait for the device, however many adapters.
    known = torch.stack([n.double() for n in norms.values()]).tolist() if norms else []
    numbers = dict(zip(norms, known, strict=True))
    with uninterrupted():
        for lane, own in zip(lanes, parts, strict=True):
            name = lane.adapter
            if name in numbers:
                try:
                    lane.check(numbers[name])
                except TrainingError as error:
                    errors[name] = error
                else:
                    tokens = sum(part.whole.tokens for part in own)
                    lane.update(norms[name], losses[name], tokens)
            if lane.adapter in errors:
                lane.drop_gradients()
    found = []
    for lane, rate in zip(lanes, rates, strict=True):
        name = lane.adapter
        norm = numbers.get(name, float("nan"))
        found.append(Stepped(losses[name], rate, norm, errors.get(name)))
    return found


def check_ready(model: PeftModel, adapters: Sequence[str]) -> None:
    """Fail when training these adapters would change nothing, or the base.

    Raises:
        StateError: one is merged into the base, or adapters are disabled.
    """
    for adapter in adapters:
        if adapter in model.roster.merged:
            raise StateError(
                f"adapter `{adapter}` is merged into the base, so training it would change "
                "nothing. Call unmerge_adapter() first."
            )
    if not model.roster.enabled:
        raise StateError("adapters are disabled. Leave disable_adapter() before training.")


@contextmanager
def in_training(model: PeftModel, lanes: Sequence[Lane]) -> Iterator[None]:
    """The model in training mode, with no gradients left over before or after."""
    was_training = model.training
    model.train()
    try:
        for lane in lanes:
            lane.drop_gradients()
        yield
    finally:
        model.train(was_training)
        for lane in lanes:
            lane.drop_gradients()


def _not_finite(lane: Lane, loss: float) -> TrainingError:
    return TrainingError(
        f"adapter `{lane.adapter}`, step {lane.step + 1} of {lane.steps}: the loss is {loss}. "
        f"Lower the learning rate (={lane.recipe.lr:g}), or train in float32."
    )


@contextmanager
def _enough_memory(company: Sequence[Part]) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        lane = company[0].lane
        others = f" with {len(company) - 1} more" if len(company) > 1 else ""
        raise TrainingError(
            f"adapter `{lane.adapter}`{others}, step {lane.step + 1} of {lane.steps}: the device "
            f"is out of memory. Lower `batch_size` (={lane.recipe.batch_size}) and raise "
            "`accumulate` by as much, shorten the examples with `max_length`, or set "
            "`gradient_checkpointing`; `multigraft plan` says what fits."
        ) from error
