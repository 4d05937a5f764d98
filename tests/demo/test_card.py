"""The model's card and demo/README.md: what they say of the shipped files is so."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from safetensors import safe_open

from multigraft.demo import RECIPE, model_path

ROOT = Path(__file__).resolve().parents[2]
CARD = (model_path() / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "demo" / "README.md").read_text(encoding="utf-8")
WEIGHTS = model_path() / "model.safetensors"


def test_both_give_the_size_of_the_weights():
    size = f"{WEIGHTS.stat().st_size:,} bytes"
    assert size in CARD
    assert size in GUIDE


def test_the_card_counts_the_parameters():
    with safe_open(WEIGHTS, "pt") as tensors:
        shapes = [tensors.get_slice(key).get_shape() for key in tensors.keys()]  # noqa: SIM118
    assert f"{sum(math.prod(shape) for shape in shapes):,} parameters" in CARD


def test_the_card_gives_the_architecture():
    config = json.loads((model_path() / "config.json").read_text())
    assert (
        f"{config['num_hidden_layers']} layers, hidden {config['hidden_size']}, feed-forward "
        f"{config['intermediate_size']}, {config['num_attention_heads']} heads over "
        f"{config['num_key_value_heads']} key/value heads, untied, {config['vocab_size']} tokens"
    ) in CARD
    assert config["tie_word_embeddings"] is False


def test_command_and_seed_are_recorded_and_the_command_is_the_guides():
    command = re.search(r"\| training command \| `(.+?)` \|", CARD)
    assert command
    assert command[1] in GUIDE
    script, *options = command[1].removeprefix("python ").split()
    assert (ROOT / script).is_file()
    assert options == ["--output", "src/multigraft/demo/model"]
    assert re.search(r"\| seed \| \d+ \|", CARD)


@pytest.mark.parametrize("what", ["held-out standard-library text", "new generated text"])
def test_losses_are_recorded_and_the_same_in_both(what):
    loss = re.search(rf"\| loss on {what} \| \**([\d.]+)\** nats per token", CARD)
    assert loss
    assert f"{loss[1]} nats per token" in GUIDE


def test_the_guides_recipe_is_the_recipe():
    said = " ".join(GUIDE.split())
    assert (
        f"LoRA of rank {RECIPE.rank} on all seven projections, {RECIPE.steps} steps of "
        f"{RECIPE.batch} examples"
    ) in said
    assert RECIPE.learning_rate == 3e-3
    assert "peak learning rate 3e-3" in said
