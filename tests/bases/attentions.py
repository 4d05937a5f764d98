"""Models with attentions, and what an adapter of them must be, said densely."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import multigraft
from multigraft import LoraConfig, get_peft_model
from tests.bases.nets import PREFIX, fill, seeded


class Attending(nn.Module):
    """Self-attention, then attention to it, batch first or not, with biases or not."""

    def __init__(self, batch_first: bool = True, bias: bool = True, **more: Any) -> None:
        super().__init__()
        kind = {"batch_first": batch_first, "bias": bias}
        self.attn = nn.MultiheadAttention(8, 2, **kind, **more)
        self.cross = nn.MultiheadAttention(8, 2, **kind)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, 8), or tokens first, to (batch, tokens, 3)."""
        y, _ = self.attn(x, x, x, need_weights=False)
        z, weights = self.cross(query=x, key=y, value=y)
        return self.head(torch.tanh(z)) * weights.sum()


def encoder(**more: Any) -> nn.Module:
    """Two of torch's encoder layers, whose evaluation reads all their layers' tensors."""
    sizes = {"d_model": 8, "nhead": 2, "dim_feedforward": 12, "dropout": 0.0, "batch_first": True}
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(**sizes | more), 2)


def decoder() -> nn.Module:
    """A decoder layer that attends to its own input."""

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, x.flip(1))

    return Decoder()


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "attention": (Attending, ["attn", "cross"]),
    "tokens first": (lambda: Attending(batch_first=False), ["attn", "cross"]),
    "without biases": (lambda: Attending(bias=False), ["attn", "cross"]),
    "extra keys": (lambda: Attending(add_bias_kv=True, add_zero_attn=True), ["attn", "cross"]),
    "encoder": (encoder, ["self_attn", "linear1", "linear2"]),
    "encoder, norm first": (lambda: encoder(norm_first=True), ["self_attn", "linear2"]),
    "decoder": (decoder, ["self_attn", "multihead_attn", "linear1"]),
}
X = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(2))


def adapted(maker: Callable[[], nn.Module], target: Any, **more: Any) -> Any:
    """Our LoRA with random values, in evaluation mode."""
    config = LoraConfig(target_modules=target, r=2, lora_alpha=3, **more)
    model = get_peft_model(seeded(maker), config)
    fill(model)
    return model.eval()


def dense(maker: Callable[[], nn.Module], state: dict[str, Tensor], scaling: float = 1.5) -> Any:
    """The plain model with W + B A in its weights, said by names on disk alone."""
    base = seeded(maker)
    with torch.no_grad():
        for key, a in state.items():
            if key.endswith("lora_A.weight"):
                path = key.removesuffix(".lora_A.weight").replace(".base_layer", "")
                layer: Any = base.get_submodule(path)
                is_whole = isinstance(layer, nn.MultiheadAttention)
                weight = layer.in_proj_weight if is_whole else layer.weight
                twice = 2 if ".base_layer.out_proj" in key else 1  # as PEFT has it
                weight += twice * scaling * state[key.replace("lora_A", "lora_B")] @ a
    return base


def weights(model: Any) -> dict[str, Tensor]:
    """The adapter's tensors by name on disk."""
    state = multigraft.get_peft_model_state_dict(model)
    return {key.removeprefix(PREFIX): value.detach() for key, value in state.items()}
