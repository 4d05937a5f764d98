"""Small adapters on disk, of a model that is made here."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from multigraft import LoraConfig, PeftConfig, get_peft_model


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 8)
        self.layers = nn.ModuleList([Block(), Block(), Block()])
        self.head = nn.Linear(8, 12, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.words


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


@torch.no_grad()
def write(folder: Path, config: PeftConfig | None = None, seed: int = 1, **fields: object) -> Path:
    """An adapter whose every tensor is random."""
    config = config or LoraConfig(**{"r": 4, "target_modules": ["up", "down"], **fields})
    model = get_peft_model(net(), config)
    torch.manual_seed(seed)
    for parameter in model.roster.parameters("default"):
        parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return folder
