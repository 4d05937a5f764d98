"""What methods do in training besides what an optimiser does: to the loss, and after each step.

Both are asked of the method of each active adapter that trains. PEFT's loops call
``model.base_model.update_and_allocate(step)`` by hand; `multigraft.train` does it itself, and
`StepHook` and `trainer_callback` do it in loops that take a hook.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from multigraft.errors import MissingExtraError
from multigraft.graft import Graft
from multigraft.methods import METHODS, Method
from multigraft.methods.contract import Params
from multigraft.roster import Roster


def penalties(roster: Roster, names: Iterable[str] | None = None) -> Iterator[Tensor]:
    """What the methods of adapters that train add to the loss; of the active ones by default."""
    for name in roster.acting() if names is None else names:
        method = _method_of(roster, name)
        if method is None or method.penalty.__func__ is Method.penalty.__func__:  # type: ignore[attr-defined]
            continue
        if not (roster.root.training or method.penalises_evaluation):
            continue
        term = method.penalty(roster.configs[name], _trained(roster, name, method))
        if term is not None:
            yield term


def penalised(roster: Roster, outputs: Any) -> Any:
    """The model's outputs, with the `penalties` in their loss, if they have one."""
    if roster.penalises and isinstance(getattr(outputs, "loss", None), Tensor):
        for term in penalties(roster):
            outputs.loss = outputs.loss + term.to(outputs.loss.device)
    return outputs


def advance(roster: Roster, step: int, names: Iterable[str] | None = None) -> None:
    """Let the methods of adapters that train do what is due after a backward pass.

    Args:
        step: the number of the training step, from 1.
        names: the adapters; the active ones by default.
    """
    for name in roster.acting() if names is None else names:
        method = _method_of(roster, name)
        if method is None or not roster.trains(name):
            continue
        schedule = roster.schedules.get(name) or method.schedule(roster.configs[name])
        if schedule is not None:
            roster.schedules[name] = schedule
            sites = {g.site.path: g.params for g in _main(roster, name, method)}
            schedule.update(step, sites)


class StepByStep:
    """`update_and_allocate`, as the models of PEFT's AdaLoRA have it."""

    roster: Roster

    def update_and_allocate(self, global_step: int) -> None:
        """What is due in training after ``backward()`` and before ``zero_grad()``.

        Args:
            global_step: the number of the training step, from 1.
        """
        advance(self.roster, global_step)


class StepHook:
    """A callable for loops that take one: call it after ``backward()``, before ``zero_grad()``.

    Args:
        model: a `PeftModel`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.step = 0

    def __call__(self, *_: Any, **__: Any) -> None:
        """One more step is done."""
        self.step += 1
        self.model.base_model.update_and_allocate(self.step)  # type: ignore[union-attr, operator]


def trainer_callback(model: nn.Module) -> Any:
    """The same for transformers' ``Trainer``: ``callbacks=[trainer_callback(model)]``.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise MissingExtraError(
            "trainer_callback needs transformers: pip install 'multigraft[train]'."
        ) from error

    class Allocate(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            tuner = model.base_model
            tuner.update_and_allocate(state.global_step + 1)  # type: ignore[union-attr, operator]

    return Allocate()


def _method_of(roster: Roster, name: str) -> type[Method] | None:
    return dict(METHODS.items()).get(str(roster.configs[name].peft_type))


def _trained(roster: Roster, name: str, method: type[Method]) -> Iterator[Params]:
    """The adapter's tensors, site by site, if it trains; found only when they are asked for."""
    if roster.trains(name):
        yield from (graft.params for graft in _main(roster, name, method))


def _main(roster: Roster, name: str, method: type[Method]) -> list[Graft]:
    return [g for _, g in roster.grafts(name) if isinstance(g.method, method)]
