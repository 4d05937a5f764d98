"""Magnitude pruning: only the largest elements of each adapter count, then a weighted sum."""

from __future__ import annotations

import torch
from torch import Tensor

from multigraft.combine.contract import rules
from multigraft.combine.linear import weighted_sum


def largest(tensor: Tensor, density: float) -> Tensor:
    """The share ``density`` of elements that are largest in magnitude; zero elsewhere."""
    flat = tensor.flatten()
    chosen = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy(0, chosen, flat[chosen]).reshape(tensor.shape)


rules("magnitude_prune", weighted_sum, largest)
