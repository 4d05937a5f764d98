"""What these programs have in common: numbers that are worth comparing, and how they are told."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn


def tell(facts: dict[str, Any]) -> None:
    print(f"FACTS {json.dumps(facts)}")


def apart(a: Tensor, b: Tensor) -> float:
    """How far two outputs are from each other; rounding aside."""
    return round(float((a - b).detach().abs().max()), 4)


def size(x: Tensor) -> float:
    """One number that any change of an output changes."""
    flat = x.detach().double().flatten()
    return round(float(flat @ torch.arange(1, len(flat) + 1, dtype=flat.dtype)), 3)


def fill(model: nn.Module, adapter: str, seed: int) -> None:
    """Give an adapter values that any library's model gets under the same names."""
    numbers = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if f".{adapter}" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=numbers) * 0.2)


def trained(model: nn.Module) -> list[str]:
    return sorted(name for name, p in model.named_parameters() if p.requires_grad)
