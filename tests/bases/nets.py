"""Tiny models whose forwards read tensors: mixtures of experts, attentions, plain parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import multigraft
from multigraft import AdaptedLayer
from tests.oracle import quiet, random_state

PREFIX = "base_model.model."
SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def mixtral() -> nn.Module:
    """Experts stored (experts, out, in)."""
    config = transformers.MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


def qwen() -> nn.Module:
    """As Mixtral's, and smaller experts."""
    config = transformers.Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, head_dim=8
    )
    return transformers.Qwen3MoeForCausalLM(config)


def gpt_oss() -> nn.Module:
    """Experts stored (experts, in, out), with stacked biases."""
    layers = ["full_attention"] * 2
    config = transformers.GptOssConfig(
        **SIZES, num_local_experts=3, num_experts_per_tok=2, head_dim=8, layer_types=layers
    )
    return transformers.GptOssForCausalLM(config)


def llama4() -> nn.Module:
    """Experts stored (experts, in, out) by a class that does not say so."""
    config = transformers.Llama4TextConfig(
        **SIZES,
        intermediate_size_mlp=24,
        num_local_experts=3,
        num_experts_per_tok=1,
        head_dim=8,
        interleave_moe_layer_step=1,
        attn_implementation="eager",
    )
    return transformers.Llama4ForCausalLM(config)


MIXTURES: dict[str, Callable[[], nn.Module]] = {
    "mixtral": mixtral,
    "qwen3_moe": qwen,
    "gpt_oss": gpt_oss,
    "llama4": llama4,
}


class Stack(nn.Module):
    """Two stacks of experts and a plain matrix, read by one forward.

    Args:
        turned: store the experts (in, out).
    """

    def __init__(self, turned: bool, experts: int) -> None:
        super().__init__()
        self.is_transposed = turned
        sizes = (6, 10) if turned else (10, 6)
        self.up = nn.Parameter(torch.randn(experts, *sizes))
        self.mix = nn.Parameter(torch.randn(6, 6))
        self.down = nn.Parameter(torch.randn(experts, *sizes[::-1]))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 6) to (batch, 6): the experts' sum."""
        up, down = (self.up, self.down) if self.is_transposed else (self.up.mT, self.down.mT)
        return (torch.tanh(x @ self.mix.T @ up) @ down).sum(0)


class Stacked(nn.Module):
    """A `Stack` between linear layers."""

    def __init__(self, turned: bool = False, experts: int = 3) -> None:
        super().__init__()
        self.before = nn.Linear(6, 6)
        self.experts = Stack(turned, experts)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 6) to (batch, 2)."""
        return self.head(self.experts(torch.tanh(self.before(x))))


def seeded(maker: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """The model with the same weights each time, in evaluation mode."""
    torch.manual_seed(seed)
    return maker().eval()


def ids(seed: int = 3) -> dict[str, Tensor]:
    """A batch for the mixtures."""
    source = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(0, 32, (3, 7), generator=source)}


def both(maker: Callable[[], nn.Module], options: Mapping[str, Any]) -> tuple[Any, Any]:
    """(ours, theirs): the same model, adapted by each library, with the same random adapter."""
    ours = multigraft.get_peft_model(seeded(maker), multigraft.LoraConfig(**options))
    with quiet():
        theirs = peft.get_peft_model(seeded(maker), peft.LoraConfig(**options))
        state = random_state(peft.get_peft_model_state_dict(theirs))
        peft.set_peft_model_state_dict(theirs, state)
    multigraft.set_peft_model_state_dict(ours, state)
    return ours.eval(), theirs.eval()


def fill(model: Any, adapter: str = "default", seed: int = 0) -> dict[str, Tensor]:
    """Random values in every tensor of one adapter; returns them by name on disk."""
    state = multigraft.get_peft_model_state_dict(model, adapter_name=adapter)
    fresh = random_state(state, seed)
    multigraft.set_peft_model_state_dict(model, fresh, adapter)
    return {key.removeprefix(PREFIX): value for key, value in fresh.items()}


def gradients(model: Any, y: Tensor) -> dict[str, Tensor]:
    """Gradients of one loss by name on disk; ours and PEFT's have the same names there."""
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    if isinstance(model, multigraft.PeftModel):
        held = multigraft.get_peft_model_state_dict(model)
        return {k: t.grad for k, t in held.items() if t.grad is not None}
    named = {n.replace(".default", ""): p.grad for n, p in model.named_parameters()}
    return {n: g for n, g in named.items() if g is not None}


def loaded(maker: Callable[[], nn.Module], folder: Path, library: Any) -> Any:
    """A fresh base with the adapter of this folder."""
    with quiet():
        return library.PeftModel.from_pretrained(seeded(maker), folder).eval()


def wrappers(model: nn.Module) -> list[AdaptedLayer]:
    """Adapted layers, each once."""
    return [m for m in model.modules() if isinstance(m, AdaptedLayer)]
