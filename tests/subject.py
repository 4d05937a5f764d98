"""A tiny model to try the laws on: what it was before, and the checks that end every test."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from multigraft import AdaptedLayer, LoraConfig, get_peft_model_state_dict
from tests.laws import assert_side_by_side, fingerprint

LINEAR = ["head", "layers.0.down", "layers.0.up", "layers.1.down", "layers.1.up"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 24)
        self.norm = nn.LayerNorm(24)
        self.down = nn.Linear(24, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.norm(self.up(x))))


class Net(nn.Module):
    """Token indices (batch, tokens) to (batch, tokens, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(9, 16)
        self.layers = nn.ModuleList([Block(), Block()])
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.conv(x.transpose(1, 2)).transpose(1, 2))


class Subject:
    """A model, what it was before, and the checks that end every test."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.base = Net().double()
        self.base.emb.weight.requires_grad_(False)  # not every flag is the default
        self.pristine = copy.deepcopy(self.base)
        self.before = fingerprint(self.base)
        self.ids = torch.arange(8).reshape(2, 4) % 9

    def config(self, target: object = "all-linear", **options: object) -> LoraConfig:
        options = {"r": 2, "init_lora_weights": False, **options}
        return LoraConfig(target_modules=target, **options)  # type: ignore[arg-type]

    def check(self) -> None:
        assert_side_by_side(self.base, self.pristine)

    def alone(self, adapter: str) -> Tensor:
        """What the base gives with this adapter's deltas added densely, and nothing else."""
        twin = copy.deepcopy(self.pristine)
        state = get_peft_model_state_dict(self.base, adapter_name=adapter)
        with torch.no_grad():
            for key, A in state.items():
                if key.endswith(".lora_A.weight"):
                    path = key.removesuffix(".lora_A.weight")
                    scaling = self.base.get_submodule(path).scaling[adapter]
                    weight = twin.get_submodule(path).weight
                    weight += scaling * state[f"{path}.lora_B.weight"] @ A
            return twin(self.ids)

    def assert_restored(self) -> None:
        assert fingerprint(self.base) == self.before


def layers(model: nn.Module) -> list[AdaptedLayer]:
    return [m for m in model.modules() if isinstance(m, AdaptedLayer)]
