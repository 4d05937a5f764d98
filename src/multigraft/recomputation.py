"""Gradient checkpointing: what a call told its layers is told again when a block runs once more.

A checkpointed block runs a second time in the backward pass, when the call is over and its route,
spans and draws with it. While the call lasts, each block's checkpoint is wrapped, so that the
second run finds what the first one found, however many calls lie between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from multigraft import draws
from multigraft.containers import AdapterDict
from multigraft.layer import AdaptedLayer

if TYPE_CHECKING:
    from multigraft.roster import Roster

CHECKPOINT = "_gradient_checkpointing_func"
"""Where transformers' models keep the function that runs a block as a checkpoint."""
WRAPPED = "checkpoint_fn"
"""Where torch's own wrapper of checkpointed modules keeps it, which FSDP's users have."""


@contextmanager
def remembered(roster: Roster) -> Iterator[None]:
    """Let checkpointed blocks of this call find its route, spans and draws in their second run."""
    wrapped = []
    if torch.is_grad_enabled():
        for module in _blocks(roster):
            name = CHECKPOINT if getattr(module, "gradient_checkpointing", False) else WRAPPED
            run = module.__dict__.get(name)
            if run is not None:
                wrapped.append((module, name, run))
                module.__dict__[name] = _remembering(roster, run)
    try:
        yield
    finally:
        for module, name, run in wrapped:
            module.__dict__[name] = run


def _blocks(roster: Roster) -> Iterator[nn.Module]:
    """Modules that may be checkpointed: the base's own, and copies that stand in for them now.

    However many adapters there are, none of their tensors' modules is looked at.
    """
    names = roster.acting() if roster.route is None else roster.route.adapters
    waiting, seen = [roster.root], set()
    while waiting:
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield module
        inner = (m for m in module._modules.values() if m is not None)
        waiting += [m for m in inner if not isinstance(m, AdapterDict)]
        if not isinstance(module, AdaptedLayer):
            continue
        acting = [graft for name in names for graft in module.grafts.get(name, ())]
        waiting += [graft.stand_in for graft in acting if graft.stand_in is not None]


def _remembering(roster: Roster, run: Callable[..., Any]) -> Callable[..., Any]:
    route, spans = roster.route, roster.spans

    def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        draw = draws.replay()

        def again(*inputs: Any, **options: Any) -> Any:
            before = roster.route, roster.spans
            roster.route, roster.spans = route, spans
            try:
                with draw():
                    return function(*inputs, **options)
            finally:
                roster.route, roster.spans = before

        return run(again, *args, **kwargs)

    return checkpoint
