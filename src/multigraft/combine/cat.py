"""Concatenation: the adapters' ranks side by side, which is exactly the weighted sum of updates.

A = [c_1 A_1; c_2 A_2; …]        B = [B_1, B_2, …]        c_i = weight_i * scaling_i
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from multigraft.combine.contract import RULES, Rule
from multigraft.combine.linear import weighted_sum

Pair = tuple[Tensor, Tensor]
"""a (n, rank, in) and b (n, out, rank)."""


def side_by_side(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """One pair whose product is the weighted sum of these pairs' products."""
    a = torch.cat([c * a for (a, _), c in zip(pairs, weights, strict=True)], 1)
    return a, torch.cat([b for _, b in pairs], 2)


RULES.register("cat", Rule("cat", weighted_sum, "stack"))
