"""A run's plan is the plan of what the run does."""

from __future__ import annotations

import pytest
import torch

from multigraft import LoraConfig
from multigraft.errors import ConfigError, TrainingError
from multigraft.planning import Request, plan, planned, request_of
from multigraft.planning.skeleton import companies
from multigraft.train import Recipe
from multigraft.train.job import AdapterJob, Job
from multigraft.train.tasks import task_of
from tests.tiny_base import write_base

pytest.importorskip("transformers")

CONFIG = LoraConfig(r=4, target_modules="all-linear")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_base(tmp_path_factory.mktemp("base")))


def job(folder, *adapters, **options):
    return Job(model=folder, output="out", adapters=adapters, device="cpu", **options)


def one(name, max_length=32, **recipe):
    return AdapterJob(
        data="x", config=CONFIG, name=name, max_length=max_length, recipe=Recipe(**recipe)
    )


def test_every_adapter_of_it_counts_with_its_own_rows_and_lengths(folder):
    run = job(folder, one("a", batch_size=2), one("b", 16, batch_size=6, accumulate=3))
    found = request_of(run, memory="1GiB")
    assert found.batch_size == {"a": 2, "b": 6}
    assert found.max_length == {"a": 32, "b": 16}
    assert (found.accumulate, found.device, found.dtype) == (3, "cpu", "float32")
    assert planned(found).fits


def test_the_optimiser_whose_state_takes_the_most_counts(folder):
    run = job(folder, one("a", optimizer="adamw8bit"), one("b", optimizer="adamw"))
    assert request_of(run).optimizer == "adamw"
    assert request_of(job(folder, one("a", optimizer="sgd"))).optimizer == "sgd"


def test_processes_share_the_rows_of_a_batch_but_for_tensor_parallelism(folder):
    run = job(folder, one("a", batch_size=10))
    assert request_of(run, gpus=4).batch_size == 3
    run = job(folder, one("a", batch_size=10), strategy="tp")
    assert request_of(run, gpus=4).batch_size == 10


def test_rows_much_longer_than_the_others_have_a_forward_of_their_own(folder):
    from multigraft.planning.memory import Bench

    lengths = {"a": 16, "b": 128, "c": 15}
    request = Request(folder, dict.fromkeys("abc", CONFIG), batch_size=2, max_length=lengths)
    bench = Bench(request)
    found = companies(bench.model, request.loads())
    assert [[load.name for load in company] for company in found] == [["b"], ["a", "c"]]
    longest = plan(folder, {"b": CONFIG}, batch_size=2, max_length=128)
    assert planned(request).kept == longest.kept


def test_a_task_puts_its_head_on_the_base(folder):
    usual = plan(folder, CONFIG, max_length=32)
    for name, ending in (("seq-cls", "SequenceClassification"), ("token-cls", "TokenClass")):
        found = plan(folder, CONFIG, max_length=32, task=name)
        assert ending in type(found.bench.base).__name__
        assert found.parts["logits and loss"] < usual.parts["logits and loss"] / 10
    run = job(folder, one("a"), task=task_of("seq-cls"))
    assert request_of(run).task == "seq-cls"


def test_an_example_of_preferences_has_two_rows(folder):
    four = plan(folder, CONFIG, batch_size=4, max_length=32)
    pairs = plan(folder, CONFIG, batch_size=2, max_length=32, task="dpo")
    assert pairs.kept == four.kept


def test_an_adapter_without_rows_is_refused(folder):
    with pytest.raises(ConfigError, match="`batch_size` says nothing of adapter `b`"):
        Request(folder, {"a": CONFIG, "b": CONFIG}, batch_size={"a": 2})


def test_a_run_that_is_out_of_memory_says_what_to_change(folder, tmp_path, monkeypatch):
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    own = AdapterJob(str(data), CONFIG, Recipe(steps=2, batch_size=4), max_length=32)
    ready = Job(model=folder, output=str(tmp_path / "out"), adapters=[own], device="cpu").prepare()

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(type(ready.model), "forward", full)
    with pytest.raises(TrainingError) as told:
        ready.run()
    message = str(told.value)
    assert "the device is out of memory" in message
    assert "A step with `batch_size` 4 and `max_length` 32 takes about" in message
    assert "`batch_size: 2` saves" in message
    assert "`gradient_checkpointing: true` saves" in message
