"""Small seeded models, what is known of a model at a moment, and layers computed by hand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multigraft import AdaptedLayer, PeftModel

VOCABULARY, WIDTH, TOKENS = 13, 8, 5


class Block(nn.Module):
    """Two linear layers with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 12)
        self.down = nn.Linear(12, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(x)))


class Net(nn.Module):
    """An embedding, a convolution over the tokens, two blocks, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 6)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def net(seed: int = 0) -> Net:
    """A `Net` in evaluation mode with seeded weights."""
    torch.manual_seed(seed)
    return Net().eval()


def ids(rows: int = 3, seed: int = 1) -> Tensor:
    """Token ids ``(rows, TOKENS)``."""
    return torch.randint(VOCABULARY, (rows, TOKENS), generator=torch.Generator().manual_seed(seed))


def base(model: nn.Module) -> nn.Module:
    """The base model behind a handle."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def layer(model: nn.Module, path: str) -> AdaptedLayer:
    """The adapted layer at a base path."""
    found = base(model).get_submodule(path)
    assert isinstance(found, AdaptedLayer), f"{path} is a {type(found).__name__}"
    return found


@torch.no_grad()
def train_by_hand(model: nn.Module, *adapters: str, seed: int = 5) -> None:
    """Give every tensor of these adapters values as if they had been trained."""
    for adapter in adapters:
        generator = torch.Generator().manual_seed(seed + sum(map(ord, adapter)))
        for _, tensor in own_parameters(model, adapter):
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.add_(0.3 * noise.to(tensor.dtype))


def own_parameters(model: nn.Module, adapter: str) -> list[tuple[str, Tensor]]:
    """(group, tensor) of what one adapter holds, found by walking the containers."""
    found = []
    for module in base(model).modules():
        if isinstance(module, AdaptedLayer):
            for group, container in module.named_children():
                if group != "base_layer" and adapter in container:  # type: ignore[operator]
                    held = container[adapter]  # type: ignore[index]
                    tensors = held.parameters() if isinstance(held, nn.Module) else [held]
                    found += [(f"{module.path}.{group}", t) for t in tensors]
    return found


def update(adapted: AdaptedLayer, adapter: str) -> Tensor:
    """``scaling * B A`` of a linear layer's LoRA, from its tensors as PEFT names them."""
    A, B = adapted.lora_A[adapter].weight, adapted.lora_B[adapter].weight
    return adapted.scaling[adapter] * (B @ A)


def known(model: nn.Module) -> dict[str, Any]:
    """All that an operation which fails must leave: objects, bits, flags, configs and states."""
    root = base(model)
    facts: dict[str, Any] = {f"module {n}": id(m) for n, m in _modules(root)}
    facts |= {f"training {n}": m.training for n, m in _modules(root)}
    for name, tensor in (*_parameters(root), *root.named_buffers(remove_duplicate=False)):
        facts[f"tensor {name}"] = id(tensor)
        facts[f"flag {name}"] = tensor.requires_grad
        facts[f"bits {name}"] = tensor.detach().clone()
    facts["attributes"] = set(vars(root))
    if isinstance(model, PeftModel):
        roster = model.roster
        facts["configs"] = {n: c.to_dict() for n, c in roster.configs.items()}
        facts["active"], facts["enabled"] = roster.active, roster.enabled
        facts["layers"] = {n: [id(x) for x in found] for n, found in roster.layers.items()}
        facts["route"] = roster.route
        for adapted in {x for found in roster.layers.values() for x in found}:
            facts[f"merged {adapted.path}"] = adapted.merged_adapters
            facts[f"kept {adapted.path}"] = sorted(adapted.kept)
            facts[f"scaling {adapted.path}"] = dict(adapted.scaling)
            facts[f"plan {adapted.path}"] = adapted.plan
    return facts


def assert_as_before(model: nn.Module, before: dict[str, Any]) -> None:
    """Fail with the first thing that is not what `known` saw."""
    after = known(model)
    assert set(after) == set(before), sorted(set(after) ^ set(before))[:8]
    for name, value in before.items():
        if isinstance(value, Tensor):
            assert same_bits(after[name], value), name
        else:
            assert after[name] == value, (name, value, after[name])


def base_bits(model: nn.Module) -> dict[str, Tensor]:
    """Copies of every tensor of a plain model."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_bits(model: nn.Module, before: dict[str, Tensor]) -> None:
    """The model has exactly these tensors, with these names, order and bits."""
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(same_bits(after[name], value) for name, value in before.items())


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal as bits: 0.0 is not -0.0, and NaN equals itself."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(
        a.detach().contiguous().reshape(-1).view(torch.uint8),
        b.detach().contiguous().reshape(-1).view(torch.uint8),
    )


def never_nested(model: nn.Module) -> None:
    """No adapted layer stands in another one, whatever holds it."""
    for module in base(model).modules():
        if isinstance(module, AdaptedLayer):
            inner = [m for m in module.modules() if m is not module]
            assert not any(isinstance(m, AdaptedLayer) for m in inner), module.path


def trainable(model: nn.Module) -> set[str]:
    """Names of the parameters that require gradients, in the base model's own terms."""
    return {n for n, p in base(model).named_parameters() if p.requires_grad}


def _modules(root: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    return root.named_modules(remove_duplicate=False)


def _parameters(root: nn.Module) -> Iterable[tuple[str, Tensor]]:
    return root.named_parameters(remove_duplicate=False)
