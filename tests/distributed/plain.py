"""A model without transformers, for processes that are started anew and must start soon."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from multigraft import LoraConfig, PeftModel, get_peft_model


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 24)
        self.down = nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Token indices (batch, tokens) to (batch, tokens, 9)."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(16, 9)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def plain(*names: str, blocks: int = 2) -> PeftModel:
    """A net with adapters of these names."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=False)
    model = get_peft_model(Net(blocks), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model


def ids_of(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 9, (4, 5), generator=generator)


def plain_loss(model: nn.Module, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
