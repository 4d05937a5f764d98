"""DARE: drop elements at random and rescale the rest, so that their expectation stays.

    t' = m t / density        m ~ Bernoulli(density)

Paper: Yu et al. 2023, arXiv:2311.03099, section 3.2; the remainder is added up (`dare_linear`) or
voted on as in TIES (`dare_ties`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from multigraft.combine.contract import rules
from multigraft.combine.linear import weighted_sum
from multigraft.combine.ties import elected_mean


def dropped(tensor: Tensor, density: float) -> Tensor:
    """Each element stays with probability ``density``, and is then divided by it."""
    return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density


rules("dare_linear", weighted_sum, dropped)
rules("dare_ties", elected_mean, dropped)
