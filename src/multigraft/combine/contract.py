"""What a rule of combination is: how several adapters' tensors become one.

    rule = sparsify (which elements count) x consensus (how they add up) x where it acts

It acts on A and on B by themselves (``"factors"``, a rough approximation of the sum of updates), on
the pairs laid side by side (``"stack"``, exact), or on the dense ΔW (``"delta"``). What is longer
than the new rank afterwards is cut by a singular value decomposition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from multigraft.registry import Registry

Sparsify = Callable[[Tensor, float], Tensor]
"""(tensor, density) to the tensor with some of its elements zero."""
Consensus = Callable[[Tensor, Tensor, str], Tensor]
"""(tensors (n, ...), weights (n,), how signs are elected) to one tensor (...)."""


@dataclass(frozen=True)
class Options:
    """What the caller chose besides the rule, checked.

    Args:
        density: the share of elements that stay, for rules that leave some out.
        majority: ``"total"`` or ``"frequency"``: how the sign of an element is elected.
        clamp: the quantile at which elements of the decomposition are cut off, or None.
        driver: which of cuSOLVER's methods decomposes, on a GPU.
    """

    density: float | None = None
    majority: str = "total"
    clamp: float | None = None
    driver: str | None = None


@dataclass(frozen=True)
class Rule:
    """One ``combination_type``.

    Args:
        name: PEFT's name.
        consensus: how weighted tensors add up.
        on: what it acts on, see the module.
        sparsify: what leaves elements out beforehand.
        truncates: whether the result is decomposed and cut to a rank.
    """

    name: str
    consensus: Consensus
    on: Literal["factors", "stack", "delta"]
    sparsify: Sparsify | None = None
    truncates: bool = False

    def merge(self, tensors: Sequence[Tensor], weights: Sequence[float], o: Options) -> Tensor:
        """One tensor of several of the same shape, with a weight each."""
        if self.sparsify is not None and o.density is not None and o.density < 1:
            tensors = [self.sparsify(tensor, o.density) for tensor in tensors]
        stack = torch.stack(list(tensors))
        w = torch.tensor(list(weights), dtype=stack.dtype, device=stack.device)
        return self.consensus(stack, w.reshape(-1, *(1,) * (stack.dim() - 1)), o.majority)


RULES: Registry[Rule] = Registry("`combination_type`")
"""Rules by PEFT's names; a new one is one file that registers itself here."""


def rules(name: str, consensus: Consensus, sparsify: Sparsify) -> None:
    """Register a rule on the factors under ``name``, and on the dense ΔW under ``name_svd``."""
    RULES.register(name, Rule(name, consensus, "factors", sparsify))
    dense = f"{name}_svd"
    RULES.register(dense, Rule(dense, consensus, "delta", sparsify, truncates=True))
