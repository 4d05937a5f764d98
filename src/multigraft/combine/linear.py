"""Weighted sums: of A and of B, each by itself.

    A = Σ sign(c_i) √|c_i| A_i        B = Σ √|c_i| B_i        c_i = weight_i * scaling_i

Paper: task arithmetic, Ilharco et al. 2022, arXiv:2212.04089, section 2, on factors as PEFT does.
Departs: the product of two sums holds the pairs A_i B_j, i ≠ j, as well, so that for two adapters
or more it is not the sum of the updates; `cat` is.
"""

from __future__ import annotations

from torch import Tensor

from multigraft.combine.contract import RULES, Rule


def weighted_sum(tensors: Tensor, weights: Tensor, majority: str) -> Tensor:
    """Σ w_i t_i over the first axis of ``(n, ...)``; nothing is elected."""
    return (tensors * weights).sum(0)


RULES.register("linear", Rule("linear", weighted_sum, "factors"))
