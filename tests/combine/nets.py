"""A base with every kind of layer on which PEFT combines by every rule, and two adapters on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import multigraft
from tests.oracle import our_config, peft_config, peft_state, quiet, random_state

EXACT = ["cat", "svd"]
SPARSE = ["ties", "dare_linear", "dare_ties", "magnitude_prune"]
RULES = ["linear", *EXACT, *SPARSE, *(f"{name}_svd" for name in SPARSE)]
KINDS = ["emb", "lin", "turned", "conv", "one"]
WEIGHTS = [0.7, -0.4]


class Net(nn.Module):
    """An embedding, a linear layer, a Conv1D, a convolution and a 1x1 convolution in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 10)
        self.lin = nn.Linear(10, 12)
        self.turned = Conv1D(9, 12)
        self.conv = nn.Conv2d(3, 7, (3, 2), padding=1)
        self.one = nn.Conv2d(7, 5, 1)
        self.head = nn.Linear(5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        """Token indices ``(batch, tokens)`` to ``(batch, 3)``."""
        x = self.turned(torch.tanh(self.lin(self.emb(ids))))
        x = torch.tanh(self.conv(x.unflatten(-1, (3, 3)).transpose(1, 2)))
        return self.head(torch.tanh(self.one(x)).mean((2, 3)))


IDS = torch.arange(12).reshape(3, 4)


def base() -> Net:
    """The same values at every call."""
    torch.manual_seed(0)
    return Net().eval()


def options(**more: Any) -> dict[str, Any]:
    """A LoRA's options on all kinds of layers."""
    return {"target_modules": KINDS, "r": 4, "lora_alpha": 6, **more}


def ours(*adapters: Mapping[str, Any]) -> Any:
    """Our model with adapters ``a``, ``b``, … with random values."""
    model = multigraft.get_peft_model(base(), our_config(adapters[0]), "a")
    for name, config in zip("bcde", adapters[1:], strict=False):
        model.add_adapter(name, our_config(config))
    for seed, name in enumerate("abcde"[: len(adapters)]):
        state = multigraft.get_peft_model_state_dict(model, adapter_name=name)
        multigraft.set_peft_model_state_dict(model, random_state(state, seed), name)
    return model.eval()


def theirs(*adapters: Mapping[str, Any]) -> Any:
    """The same of PEFT's."""
    with quiet():
        model = peft.get_peft_model(base(), peft_config(adapters[0]), "a")
        for name, config in zip("bcde", adapters[1:], strict=False):
            model.add_adapter(name, peft_config(config))
        for seed, name in enumerate("abcde"[: len(adapters)]):
            state = random_state(peft_state(model, name), seed)
            peft.set_peft_model_state_dict(model, state, name)
    return model.eval()


def combine(model: Any, rule: str, weights: Any = WEIGHTS, name: str = "sum", **more: Any) -> Any:
    """Combine ``a``, ``b``, … and make the result the active adapter."""
    if rule.removesuffix("_svd") in SPARSE:
        more = {"density": 0.6, **more}
    adapters = list("abcde"[: len(weights)])
    with quiet():
        model.add_weighted_adapter(adapters, weights, name, rule, **more)
        model.base_model.set_adapter([name])
    return model.eval()


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """What is dropped at random follows from this seed, whatever else was drawn before."""
    source, draw = torch.Generator().manual_seed(seed), torch.bernoulli
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "bernoulli", lambda p: draw(p, generator=source))
        yield


def deltas(model: Any, adapter: str) -> dict[str, Tensor]:
    """An adapter's ΔW by layer, dense, as merging adds it."""
    roster = model.roster
    return {
        layer.path: graft.method.delta(graft.params, graft.site.weight()).detach()
        for layer, graft in roster.grafts(adapter)
        if graft.method.kind == "additive"
    }


def state(model: Any, adapter: str = "sum") -> dict[str, Tensor]:
    """An adapter's tensors as they are saved."""
    return multigraft.get_peft_model_state_dict(model, adapter_name=adapter)
