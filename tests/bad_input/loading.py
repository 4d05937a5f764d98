"""A good checkpoint, and every way to load it once it is damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from multigraft import LoraConfig, MultigraftError, PeftModel, get_peft_model
from tests.weaknesses import nets

CONFIG = LoraConfig(r=2, target_modules=["up", "conv", "embed"], modules_to_save=["head"])
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."


def onto_a_plain_model(folder: Path, **options: Any) -> tuple[Any, Callable[[], object]]:
    model = nets.net()
    return model, lambda: PeftModel.from_pretrained(model, folder, **options)


def beside_another(folder: Path, **options: Any) -> tuple[Any, Callable[[], object]]:
    model = get_peft_model(nets.net(), CONFIG)
    nets.train_by_hand(model, "default")
    return model, lambda: model.load_adapter(folder, "new", **options)


def over_one_of_that_name(folder: Path, **options: Any) -> tuple[Any, Callable[[], object]]:
    model = get_peft_model(nets.net(), CONFIG)
    nets.train_by_hand(model, "default")
    return model, lambda: model.load_adapter(folder, "default", **options)


def beside_a_merged_one(folder: Path, **options: Any) -> tuple[Any, Callable[[], object]]:
    model, _ = beside_another(folder)
    model.merge_adapter()
    return model, lambda: model.load_adapter(folder, "new", **options)


WAYS = [onto_a_plain_model, beside_another, over_one_of_that_name, beside_a_merged_one]
ways = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


def refused(
    error: type[MultigraftError], model: Any, attempt: Callable[[], object], folder: Path
) -> str:
    """The message of a refusal that changed neither the model nor a file."""
    files = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    facts = nets.known(model)
    with pytest.raises(error) as caught:
        attempt()
    nets.assert_as_before(model, facts)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == files
    return str(caught.value)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Save changed tensors in place of the good ones."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def resettle(folder: Path, **values: Any) -> None:
    """Save a changed config in place of the good one."""
    settings = json.loads((folder / SETTINGS).read_text()) | values
    (folder / SETTINGS).write_text(json.dumps(settings))
