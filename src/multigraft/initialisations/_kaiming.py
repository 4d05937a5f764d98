"""The uniform draw with which `nn.Linear`, and so LoRA's A, begins."""

from __future__ import annotations

import math

from torch import Tensor


def kaiming(tensor: Tensor) -> None:
    """Kaiming uniform with ``a = sqrt(5)``: the bound is 1 / sqrt(fan in)."""
    bound = 1 / math.sqrt(max(1, tensor[0].numel()))
    tensor.uniform_(-bound, bound)
