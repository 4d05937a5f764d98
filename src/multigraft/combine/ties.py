"""TIES: trim to the largest elements, elect a sign for each, average those that agree with it.

    t = Σ_{i agrees} w_i t_i / number that agree

Paper: Yadav et al. 2023, arXiv:2306.01708, section 4 and algorithm 1.
Departs: signs are elected before weights are applied, and weighted elements are averaged, as in
PEFT; an element whose sum is zero is elected as positive.
"""

from __future__ import annotations

from torch import Tensor

from multigraft.combine.contract import rules
from multigraft.combine.magnitude_prune import largest


def elected_mean(tensors: Tensor, weights: Tensor, majority: str) -> Tensor:
    """The mean of the weighted elements of the elected sign, over the first axis of ``(n, ...)``.

    Args:
        majority: ``"total"`` elects the sign of the sum, ``"frequency"`` the commoner sign.
    """
    votes = tensors if majority == "total" else tensors.sign()
    is_positive = votes.sum(0) >= 0
    agrees = ((tensors > 0) & is_positive) | ((tensors < 0) & ~is_positive)
    return (tensors * weights * agrees).sum(0) / agrees.sum(0).clamp_min(1)


rules("ties", elected_mean, largest)
