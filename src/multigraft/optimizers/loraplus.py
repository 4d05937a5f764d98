"""LoRA+: B learns faster than A.

    lr of B = ratio * lr of A

Paper: Hayou et al. 2024, arXiv:2402.12354, section 5.
Departs: one-dimensional parameters (DoRA's magnitudes, biases, norms) take B's rate, and factors
of embeddings a small one of their own, as in the authors' code and PEFT's.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from torch.optim import Optimizer

from multigraft.errors import MultigraftWarning
from multigraft.optimizers.factors import (
    check_class,
    check_number,
    is_lookup,
    own_grafts,
    trainable,
)

WHERE = "create_loraplus_optimizer"
EIGHT_BIT = frozenset({"Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit"})


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    **kwargs: Any,
) -> Optimizer:
    """An ``optimizer_cls`` over what trains in ``model``, in four groups.

    The groups are, in PEFT's order: A and whatever else has two dimensions or more; factors of
    embeddings; B and one-dimensional parameters; those of them that do not decay (biases, and all
    in a `torch.nn.LayerNorm`).

    Args:
        lr: A's rate.
        loraplus_lr_ratio: B's rate, divided by ``lr``.
        kwargs: the optimiser's own, and ``loraplus_weight_decay`` (0 by default) and
            ``loraplus_lr_embedding`` (1e-6 by default).

    Raises:
        ConfigError: an argument is out of range.
        StateError: nothing trains.
    """
    check_class(WHERE, optimizer_cls)
    check_number(WHERE, "loraplus_lr_ratio", loraplus_lr_ratio, above=0)
    decay = kwargs.pop("loraplus_weight_decay", 0.0)
    rates = {
        "A": lr,
        "embedding": kwargs.pop("loraplus_lr_embedding", 1e-6),
        "B": lr * loraplus_lr_ratio,
        "B without decay": lr * loraplus_lr_ratio,
    }
    if "weight_decay" in kwargs:
        warnings.warn(
            f"{WHERE}: every group has a decay of its own, so `weight_decay` "
            f"(={kwargs['weight_decay']}) has no effect. Use `loraplus_weight_decay`.",
            MultigraftWarning,
            stacklevel=2,
        )
    members = _grouped(model)
    groups = [
        {"params": members[group], "weight_decay": 0.0 if "without" in group else decay, "lr": rate}
        for group, rate in rates.items()
    ]
    optimizer = optimizer_cls(groups, **{"lr": lr, **kwargs})
    if optimizer_cls.__name__ in EIGHT_BIT:
        _keep_embeddings_wide(model)
    return optimizer


def _grouped(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """What trains, by the name of its group, in the model's order."""
    roles = _roles(model)
    norms = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    members: dict[str, list[nn.Parameter]] = {
        name: [] for name in ("A", "embedding", "B", "B without decay")
    }
    for path, parameter in trainable(model):
        role, name = roles.get(id(parameter), ("A", path.rpartition(".")[2]))
        if role == "A" and parameter.ndim == 1:
            role = "B"
        if role == "B" and (id(parameter) in norms or "bias" in name):
            role = "B without decay"
        members[role].append(parameter)
    return members


def _roles(model: nn.Module) -> dict[int, tuple[str, str]]:
    """By identity: the group by role, and the name that the adapter's method declares."""
    roles = {}
    for graft in own_grafts(model):
        for name, tensor in graft.params.items():
            role = "B" if name.startswith("lora_B") else "A"
            has_factors = graft.method.prefix == "lora_" and graft.site.geometry is not None
            if has_factors and name in graft.method.geometry.factors and is_lookup(graft):
                role = "embedding"
            roles[id(tensor)] = role, name
    return roles


def _keep_embeddings_wide(model: nn.Module) -> None:
    """Let bitsandbytes keep 32-bit states for embeddings, as its authors advise."""
    import bitsandbytes  # its optimiser was given, so it is there

    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
