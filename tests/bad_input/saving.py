"""A model to save, and what a folder holds."""

from __future__ import annotations

from pathlib import Path

import torch

from multigraft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from tests.weaknesses import nets

NAMES = ("default", "b", "c")


def trained(seed: int = 5) -> PeftModel:
    """Three adapters with values of their own."""
    model = get_peft_model(nets.net(), LoraConfig(r=2, target_modules=["up", "down"]))
    model.add_adapter("b", LoraConfig(r=3, target_modules=["up"], modules_to_save=["head"]))
    model.add_adapter("c", LoraConfig(r=2, target_modules=["embed", "conv"]))
    nets.train_by_hand(model, *NAMES, seed=seed)
    return model


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below the folder, hidden ones too, with the bytes of files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def assert_loads_as(model: PeftModel, folder: Path) -> None:
    """The folder holds these three adapters, to the bit."""
    loaded = PeftModel.from_pretrained(nets.net(), folder)
    for name in NAMES:
        if name != "default":
            loaded.load_adapter(folder / name, name)
        theirs = get_peft_model_state_dict(loaded, adapter_name=name)
        for key, tensor in get_peft_model_state_dict(model, adapter_name=name).items():
            assert torch.equal(theirs[key], tensor), f"{name}: {key}"
