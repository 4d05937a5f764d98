"""Optimisers by name: one entry each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from multigraft.errors import ConfigError
from multigraft.optimizers.eight_bit import adamw8bit, paged_adamw8bit
from multigraft.registry import Registry
from multigraft.whole import is_parted

Groups = list[dict[str, list[nn.Parameter]]]
Make = Callable[..., torch.optim.Optimizer]
"""Called with groups of parameters, ``lr``, ``weight_decay`` and options."""

OPTIMIZERS: Registry[Make] = Registry("optimizer")


def make(
    name: str,
    parameters: Sequence[nn.Parameter],
    *,
    lr: float,
    weight_decay: float,
    options: Mapping[str, Any],
) -> torch.optim.Optimizer:
    """The optimiser of that name over one adapter's parameters.

    Raises:
        ConfigError: it does not take these options.
        UnsupportedError: there is no such optimiser.
    """
    factory = OPTIMIZERS[name]
    try:
        groups = [{"params": own} for own in alike(parameters)]
        return factory(groups, lr=lr, weight_decay=weight_decay, **options)
    except (TypeError, ValueError, IndexError) as error:
        raise ConfigError(
            f"`optimizer_options` (={dict(options)!r}): {name} does not take them ({error})."
        ) from error


def alike(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters that lie in parts on several processes apart from the others.

    Operators over many tensors do not take both at once.
    """
    apart: dict[bool, list[nn.Parameter]] = {}
    for parameter in parameters:
        apart.setdefault(is_parted(parameter), []).append(parameter)
    return list(apart.values())


def _adamw(groups: Groups, **options: Any) -> torch.optim.Optimizer:
    # One kernel for all tensors, wherever torch has it.
    return torch.optim.AdamW(groups, **{"fused": _can_fuse(groups), **options})


def _can_fuse(groups: Groups) -> bool:
    parameters = [parameter for group in groups for parameter in group["params"]]
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)


def _sgd(groups: Groups, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, **options)


OPTIMIZERS.register("adamw", _adamw)
OPTIMIZERS.register("adamw8bit", adamw8bit)
OPTIMIZERS.register("paged_adamw8bit", paged_adamw8bit)
OPTIMIZERS.register("sgd", _sgd)
