"""A lane: its parameters, its place in the data, and the loss of its rows."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from multigraft import AdapterNameError, LoraConfig, TrainingError
from multigraft.train import Lane, Recipe, attach, load_model
from multigraft.train.encode import IGNORED
from multigraft.train.tasks.causal_lm import learned_tokens, row_losses
from tests.tiny_base import numbers


@pytest.fixture
def model(base_dir):
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"])
    return attach(load_model(base_dir), config, "a")


def test_it_holds_the_adapters_own_tensors_and_no_others(model):
    model = attach(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), "b")
    own = {id(p) for p in Lane(model, "a", numbers(4), Recipe()).parameters}
    names = {n for n, p in model.named_parameters() if id(p) in own}
    layers = [f"base_model.model.model.layers.{n}.self_attn.q_proj" for n in (0, 1)]
    assert names == {
        *(f"{layer}.lora_{half}.a.weight" for layer in layers for half in "AB"),
        "base_model.model.model.norm.modules_to_save.a.weight",
    }


def test_its_batches_follow_the_order_of_its_seed(model):
    recipe = Recipe(batch_size=3, seed=5)
    examples = numbers(7)
    lane = Lane(model, "a", examples, recipe)
    rows = [lane.order[n] for n in range(3, 6)]
    lane.step = 1
    (part,) = lane.parts()
    assert part.batch.ids.tolist() == [examples[row].ids for row in rows]


def test_an_unknown_adapter_is_refused(model):
    with pytest.raises(AdapterNameError, match="`c`"):
        Lane(model, "c", numbers(4), Recipe())


def test_a_lane_without_examples_is_refused(model):
    with pytest.raises(TrainingError, match="`a` has no examples"):
        Lane(model, "a", [], Recipe())


def test_row_losses_are_those_of_each_row_alone():
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 11)
    labels = torch.randint(0, 11, (3, 5))
    labels[0, :3] = IGNORED
    labels[2] = IGNORED
    expected = [
        F.cross_entropy(row[:-1], label[1:], ignore_index=IGNORED, reduction="sum")
        for row, label in zip(logits, labels, strict=True)
    ]
    assert torch.allclose(row_losses(logits, labels), torch.stack(expected))
    assert learned_tokens(labels) == 2 + 4 + 0
