"""Small models, the same for the same seed, and both libraries' adapters on them."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import multigraft
from tests.oracle import quiet

IN, OUT = 16, 20


class Net(nn.Module):
    """Two layers, one of them stored transposed, with nothing linear between them."""

    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        self.first = Conv1D(12, IN) if turned else nn.Linear(IN, 12)
        self.second = nn.Linear(12, OUT)
        if turned:
            nn.init.normal_(self.first.weight, std=IN**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., 16)`` to ``(..., 20)``."""
        return self.second(torch.tanh(self.first(x)))


def net(turned: bool = False, dtype: torch.dtype = torch.float32) -> Net:
    """A base model."""
    torch.manual_seed(0)
    return Net(turned).to(dtype).requires_grad_(False).eval()


def batch(rows: int = 5, seed: int = 1) -> Tensor:
    """Input for it, ``(rows, 16)``."""
    return torch.randn(rows, IN, generator=torch.Generator().manual_seed(seed))


def options(init: str | bool, **more: Any) -> dict[str, Any]:
    """Arguments of a config of either library."""
    targets = ["first", "second"]
    return {"r": 4, "lora_alpha": 6, "target_modules": targets, "init_lora_weights": init} | more


def ours(init: str | bool, base: nn.Module | None = None, **more: Any) -> Any:
    """The base with an adapter of this library."""
    config = multigraft.LoraConfig(**options(init, **more))
    return multigraft.get_peft_model(net() if base is None else base, config).eval()


def theirs(init: str | bool, base: nn.Module | None = None, **more: Any) -> Any:
    """The base with an adapter of PEFT."""
    config = peft.LoraConfig(**options(init, **more))
    with quiet():
        return peft.get_peft_model(net() if base is None else base, config).eval()


def train(model: Any, seed: int = 7, size: float = 0.1) -> Any:
    """Move the trainable values, the same way in both libraries."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=source)
    return model


def factors(model: Any, path: str, adapter: str = "default") -> tuple[Tensor, Tensor]:
    """A and B of either library's adapter at one layer."""
    layer = model.get_base_model().get_submodule(path)
    return layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()


def off(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float(((found - expected).abs().max() / expected.abs().max()).detach())
