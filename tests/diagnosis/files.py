"""Adapters on disk to examine: saved by us, and then bent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from multigraft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from multigraft.diagnosis import Diagnosis, Finding
from tests.weaknesses import nets

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
Tensors = dict[str, Tensor]
CONFIG = LoraConfig(r=2, target_modules=["up", "conv", "embed"], modules_to_save=["head"])
UP_A, UP_B = (f"{PREFIX}blocks.0.up.lora_{x}.weight" for x in "AB")


def write(folder: Path, config: PeftConfig) -> Path:
    """A trained adapter of this config on `nets.net`."""
    model = get_peft_model(nets.net(), config)
    nets.train_by_hand(model, "default", seed=3)
    model.save_pretrained(folder)
    return folder


def output(folder: Path) -> Tensor:
    """What `nets.net` makes of some tokens with the adapter in this folder."""
    with torch.no_grad():
        return PeftModel.from_pretrained(nets.net(), folder)(nets.ids())


def into_memory(key: str) -> str:
    """A name of the file as it is in memory."""
    return key.replace(".weight", ".default.weight") if ".lora_" in key else key


def without_prefix(key: str) -> str:
    """A name relative to the base model."""
    return key.removeprefix(PREFIX)


def tensors(folder: Path) -> Tensors:
    return load_file(folder / WEIGHTS)


def settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / SETTINGS).read_text())


def rewrite(folder: Path, change: Callable[[Tensors], Tensors | None]) -> None:
    """Save changed tensors; the change may be in place."""
    held = tensors(folder)
    held = {key: tensor.clone() for key, tensor in held.items()}
    changed = change(held)
    save_file(held if changed is None else changed, folder / WEIGHTS, {"format": "pt"})


def rename(folder: Path, change: Callable[[str], str]) -> None:
    rewrite(folder, lambda held: {change(key): tensor for key, tensor in held.items()})


def resettle(folder: Path, **values: Any) -> None:
    """Save changed values of the config; those that are Ellipsis are taken away."""
    held = settings(folder) | values
    kept = {key: value for key, value in held.items() if value is not ...}
    (folder / SETTINGS).write_text(json.dumps(kept))


def the(diagnosis: Diagnosis, law: str) -> Finding:
    """The only finding, or note, of this check."""
    found = [each for each in (*diagnosis.findings, *diagnosis.notes) if each.law == law]
    assert len(found) == 1, str(diagnosis)
    return found[0]


def only(diagnosis: Diagnosis, law: str) -> Finding:
    """The one finding, which is of this check."""
    assert [each.law for each in diagnosis.findings] == [law], str(diagnosis)
    return diagnosis.findings[0]
