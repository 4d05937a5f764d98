"""What holds for every task: it learns, alone and in company, and can be reloaded."""

from __future__ import annotations

import json

import pytest
import torch

from multigraft import PeftModel
from multigraft.train import Lane, Recipe, train
from multigraft.train.batches import join
from multigraft.train.store import Store
from multigraft.train.tasks import described, task_of
from tests.train.tasks.bases import SUBJECTS

EVERY = pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: s.name)


def gradients(model, name):
    return {
        path: p.grad.clone()
        for path, p in model.named_parameters()
        if f".{name}." in path and p.grad is not None
    }


@EVERY
def test_in_a_joined_batch_each_adapter_has_the_loss_and_gradients_that_it_has_alone(
    subject, set_up
):
    own = set_up(subject)
    model = own.grown("a", "b", exact=True, init_lora_weights=False)
    parts = {"a": own.batch(0, 5), "b": own.batch(5, 12)}
    alone = {}
    for name, batch in parts.items():
        model.set_adapter(name)
        losses, _ = own.loss(model, batch)
        (losses.sum() / own.task.count(batch)).backward()
        alone[name] = losses.detach(), gradients(model, name)
        model.zero_grad(set_to_none=True)
    for parameter in model.roster.parameters("a"):
        parameter.requires_grad_(True)
    names = [name for name, batch in parts.items() for _ in range(batch.rows)]
    together, _ = own.loss(model, join(list(parts.values()), own.pad), adapter_names=names)
    each = together.split([batch.rows for batch in parts.values()])
    counts = [own.task.count(batch) for batch in parts.values()]
    sum(rows.sum() / count for rows, count in zip(each, counts, strict=True)).backward()
    for (name, (losses, grads)), found in zip(alone.items(), each, strict=True):
        assert torch.allclose(found, losses, rtol=1e-9, atol=1e-12)
        joined = gradients(model, name)
        assert grads and joined.keys() == grads.keys()
        assert any(float(g.abs().max()) > 1e-6 for g in grads.values())
        for path, gradient in grads.items():
            assert torch.allclose(joined[path], gradient, rtol=1e-8, atol=1e-11), path


@pytest.mark.parametrize("subject", [s for s in SUBJECTS if s.measure], ids=lambda s: s.name)
def test_training_makes_the_measure_rise(subject, set_up):
    own = set_up(subject)
    model = own.grown("a", r=8)
    before = own.task.measures(model, own.examples, pad=own.pad, batch_size=8)
    recipe = Recipe(steps=subject.steps, lr=1e-2, batch_size=8)
    losses = train(model, Lane(model, "a", own.examples, recipe, own.pad, task=own.task))
    after = own.task.measures(model, own.examples, pad=own.pad, batch_size=8)
    assert after[subject.measure] >= subject.reached > before[subject.measure], (before, after)
    assert sum(losses[-5:]) < sum(losses[:5])
    assert not model.training


@EVERY
def test_a_saved_adapter_gives_the_same_outputs_again(subject, set_up, tmp_path):
    own = set_up(subject)
    model = own.grown("a")
    recipe = Recipe(steps=3, lr=1e-2, batch_size=4)
    train(model, Lane(model, "a", own.examples, recipe, own.pad, task=own.task))
    model.eval()
    with torch.no_grad():
        expected, _ = own.loss(model, own.batch(0, 6))
    model.save_pretrained(tmp_path)
    task = task_of(json.loads(json.dumps(described(own.task))))
    assert task == own.task
    again = PeftModel.from_pretrained(task.load(own.folder, device="cpu"), tmp_path / "a").eval()
    assert again.active_peft_config.task_type == task.task_type
    with torch.no_grad():
        found, _ = own.loss(again, own.batch(0, 6))
    assert torch.equal(found, expected)


@EVERY
def test_its_examples_come_out_of_the_store_as_they_went_in(subject, set_up):
    own = set_up(subject)
    store = Store(own.task.example, 1)
    for example in own.examples:
        store.append(example)
    assert list(store) == own.examples
    assert store.lengths == [len(example) for example in own.examples]
