"""How llama.cpp names and lays out the tensors that adapters act on.

`blk.<layer>.<name>.weight.lora_a` for A (rank, in) and `.lora_b` for B (out, rank); the embedding's
A stands transposed. In llama's architecture the rows of q and k, so those of their B, are permuted:
each head's two halves are interleaved. Architectures whose tensors need more are not here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from multigraft.errors import UnsupportedError, listed
from multigraft.exchange.contract import MERGE_FIRST
from multigraft.reading import shown

USUAL = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
PHI = {
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER = {"model.embed_tokens": "token_embd", "lm_head": "output"}
SUFFIXES = {"A": ".weight.lora_a", "B": ".weight.lora_b"}


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's.

    Args:
        name: there.
        layers: names below a layer to llama.cpp's.
        permutes: whether the rows of q and k are.
    """

    name: str
    layers: Mapping[str, str]
    permutes: bool = False


ARCHITECTURES = {
    "llama": Architecture("llama", USUAL, permutes=True),
    "mistral": Architecture("llama", USUAL, permutes=True),
    "qwen2": Architecture("qwen2", USUAL),
    "qwen3": Architecture("qwen3", USUAL),
    "gemma": Architecture("gemma", USUAL),
    "gemma2": Architecture("gemma2", USUAL),
    "gemma3_text": Architecture("gemma3", USUAL),
    "phi3": Architecture("phi3", PHI),
}
"""By transformers' ``model_type``."""


def architecture_of(config: Mapping[str, Any], where: str) -> Architecture:
    """What llama.cpp calls a base of this config.

    Raises:
        UnsupportedError: it is none of those above.
    """
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise UnsupportedError(
            f"{where}: its base is {shown(kind)}; written are {listed(sorted(ARCHITECTURES))}. "
            "Use llama.cpp's convert_lora_to_gguf.py on `multigraft export --for vllm`, which has "
            f"one rank and one scale. {MERGE_FIRST}"
        )
    return ARCHITECTURES[kind]


def gguf_name(architecture: Architecture, path: str, where: str) -> str:
    """The name there of a layer's weight, without its ending.

    Raises:
        UnsupportedError: there is no such tensor.
    """
    if path in OUTER:
        return OUTER[path]
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", path)
    inner = architecture.layers.get(match[2]) if match else None
    if match is None or inner is None:
        raise UnsupportedError(
            f"{where}: {shown(path)} is no layer that llama.cpp adapts in {architecture.name} "
            f"models. {MERGE_FIRST}"
        )
    return f"blk.{match[1]}.{inner}"


def path_of(architecture: Architecture, name: str) -> str | None:
    """The layer of a name there, or None."""
    outer = {new: old for old, new in OUTER.items()}
    if name in outer:
        return outer[name]
    inner = {new: old for old, new in architecture.layers.items()}
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", name)
    if match is None or match[2] not in inner:
        return None
    return f"model.layers.{match[1]}.{inner[match[2]]}"


def heads_of(config: Mapping[str, Any], path: str) -> int | None:
    """Into how many heads the rows of a layer's B are permuted; None where they are not."""
    last = path.rpartition(".")[2]
    heads = config.get("num_attention_heads")
    if last == "k_proj":
        heads = config.get("num_key_value_heads") or heads
    return int(heads) if last in ("q_proj", "k_proj") and heads else None


def interleaved(B: Tensor, heads: int) -> Tensor:
    """B ``(out, rank)`` with each head's two halves interleaved, as llama.cpp has q and k."""
    out, rank = B.shape
    return B.reshape(heads, 2, out // heads // 2, rank).transpose(1, 2).reshape(out, rank)


def halved(B: Tensor, heads: int) -> Tensor:
    """The inverse of `interleaved`."""
    out, rank = B.shape
    return B.reshape(heads, out // heads // 2, 2, rank).transpose(1, 2).reshape(out, rank)
