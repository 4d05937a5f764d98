"""Adapters for the tests of exchange, and what they add at each layer, computed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SIZES = {
    "model.layers.0.self_attn.q_proj": (16, 16),
    "model.layers.0.self_attn.v_proj": (16, 8),
    "model.layers.1.self_attn.q_proj": (16, 16),
    "model.layers.1.mlp.down_proj": (24, 16),
}
"""(in, out) of layers of the tiny base."""


def write(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    extra: dict[str, Tensor] | None = None,
    **config: Any,
) -> Path:
    """A LoRA on `SIZES`, with the ranks that the config means."""
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": []}
    values["target_modules"] = sorted({path.rpartition(".")[2] for path in SIZES})
    values |= {"task_type": "CAUSAL_LM", "base_model_name_or_path": None} | config
    tensors = dict(extra or {})
    generator = torch.Generator().manual_seed(0)
    for path, (in_, out) in SIZES.items():
        rank = of_site(values.get("rank_pattern"), path, values["r"])
        for leaf, shape in (("lora_A", (rank, in_)), ("lora_B", (out, rank))):
            value = torch.randn(shape, generator=generator).to(dtype)
            tensors[f"base_model.model.{path}.{leaf}.weight"] = value
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


def of_site(patterns: dict[str, Any] | None, path: str, default: Any) -> Any:
    """A pattern is the end of a path here."""
    return next((v for k, v in (patterns or {}).items() if path.endswith(k)), default)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def settings_in(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return values


def changes(folder: Path) -> dict[str, Tensor]:
    """ΔW by path, in float64, as PEFT's rules have it."""
    values, tensors = settings_in(folder), tensors_in(folder)
    found = {}
    for path in SIZES:
        A, B = (tensors[f"base_model.model.{path}.lora_{x}.weight"].double() for x in "AB")
        rank = of_site(values.get("rank_pattern"), path, values["r"])
        alpha = of_site(values.get("alpha_pattern"), path, values["lora_alpha"])
        scale = alpha / (rank**0.5 if values.get("use_rslora") else rank)
        found[path] = scale * B @ A
    return found


def changes_read_globally(folder: Path) -> dict[str, Tensor]:
    """ΔW as a program has it that knows `r` and `lora_alpha` alone."""
    values, tensors = settings_in(folder), tensors_in(folder)
    scale = values["lora_alpha"] / values["r"]
    found = {}
    for path in SIZES:
        A, B = (tensors[f"base_model.model.{path}.lora_{x}.weight"].double() for x in "AB")
        found[path] = scale * B @ A
    return found
