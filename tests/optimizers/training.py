"""Steps of optimisers on the same model in both libraries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import multigraft
from tests.oracle import (
    Net,
    Pair,
    add_to_both,
    gradients,
    graft_pair,
    peft_state,
    plain_name,
    train_step,
)

LINEAR = ["lin0", "turned", "lin1"]
CONFIG = {"target_modules": LINEAR, "r": 4, "lora_alpha": 6, "rank_pattern": {"lin0": 2}}


def pair(config: dict[str, Any] = CONFIG, maker: Any = Net) -> Pair:
    """One model in both libraries, in training mode, with the same random adapter."""
    made = graft_pair(maker, config)
    made.ours.train(), made.theirs.train()
    return made


def two_adapters(first: dict[str, Any] = CONFIG, second: dict[str, Any] = CONFIG) -> Pair:
    """Another adapter beside, inactive."""
    made = pair(first)
    add_to_both(made, "other", second)
    made.ours.train(), made.theirs.train()
    return made


def steps(pair: Pair, ours: Any, theirs: Any, count: int = 3) -> None:
    """Train both, each step from the same gradients: PEFT's, which ours are to rounding."""
    for _ in range(count):
        train_step(pair)
        found = gradients(pair.theirs)
        for name, parameter in pair.ours.named_parameters():
            if parameter.grad is not None:
                parameter.grad.copy_(found[plain_name(name)])
        ours.step()
        theirs.step()


def own_steps(pair: Pair, ours: Any, count: int) -> None:
    """Train ours alone."""
    for _ in range(count):
        train_step(pair)
        ours.step()


def all_values(model: Any) -> dict[str, Tensor]:
    """Every parameter, by a name that both libraries give."""
    return {plain_name(n): p.detach().clone() for n, p in model.named_parameters()}


def assert_same(pair: Pair, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """All adapters' values agree."""
    for adapter in pair.theirs.peft_config:
        own = multigraft.get_peft_model_state_dict(pair.ours, adapter_name=adapter)
        other = peft_state(pair.theirs, adapter)
        for key, value in own.items():
            torch.testing.assert_close(value, other[key], rtol=rtol, atol=atol, msg=key)
