"""Adapters that learn in one run end as they do alone; a run that is taken up, as if never left."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from multigraft import LoHaConfig, LoraConfig, MultigraftWarning, TrainingError
from multigraft.train import AdapterJob, Evaluated, Finished, Job, Progress, Recipe, Watch
from tests.tiny_base import pair_rows, write_lines

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def adapters(tmp_path):
    """Makes adapters that differ in all that may differ."""

    def make(count: int, dropout: float = 0.0, **recipe: object) -> list[AdapterJob]:
        made = []
        for n in range(count):
            rows = [
                {"prompt": f"{n} {row['prompt']}", "completion": row["completion"] * (1 + n % 3)}
                for row in pair_rows()[: 5 + n]
            ]
            config = LoraConfig(
                r=2 + n % 3,
                lora_alpha=8,
                lora_dropout=dropout * n / 4,
                target_modules="all-linear" if n % 2 else ["q_proj", "down_proj"],
            )
            settings = {"steps": 3 + n % 3, "batch_size": 2 + n % 2, "lr": 1e-2 / (n + 1)}
            made.append(
                AdapterJob(
                    str(write_lines(tmp_path / f"data{n}.jsonl", rows)),
                    config,
                    Recipe(**{**settings, "seed": n, **recipe}),
                    f"a{n}",
                )
            )
        return made

    return make


@pytest.fixture
def job(base_dir, tmp_path):
    def make(adapters, output="together", **options: object) -> Job:
        return Job(str(base_dir), str(tmp_path / output), adapters, device="cpu", **options)

    return make


def assert_same(one: Path, other: Path, exactly: bool = False) -> None:
    ours, theirs = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        if exactly:
            assert torch.equal(value, theirs[key]), key
        else:
            assert torch.allclose(value, theirs[key], rtol=1e-3, atol=2e-5), key


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_adapters_of_one_run_equal_those_trained_alone(adapters, job, count, dropout):
    chosen = adapters(count, dropout, accumulate=2 if count == 3 else 1)
    together = job(chosen).prepare().run()
    for own, outcome in zip(chosen, together, strict=True):
        (alone,) = job([own], f"alone-{own.name}").prepare().run()
        assert torch.allclose(torch.tensor(outcome.losses), torch.tensor(alone.losses), rtol=1e-4)
        assert_same(outcome.folder, alone.folder)
        assert len(set(outcome.losses)) == len(outcome.losses)


def test_rows_of_all_adapters_share_one_forward(adapters, job):
    ready = job(adapters(3, steps=2)).prepare()
    seen = []
    ready.base.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    ready.run()
    assert seen == [2 + 3 + 2] * 2


def test_a_method_that_cannot_share_a_batch_has_its_own(adapters, job):
    from multigraft import PromptTuningConfig

    chosen = adapters(2)
    prompt = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    loha = LoHaConfig(r=2, target_modules=["q_proj"])
    chosen = [
        *chosen,
        *(
            AdapterJob(chosen[0].data, config, Recipe(steps=3, batch_size=2), name)
            for config, name in ((prompt, "prompt"), (loha, "loha"))
        ),
    ]
    together = job(chosen).prepare().run()
    for own, outcome in zip(chosen, together, strict=True):
        (alone,) = job([own], f"alone-{own.name}").prepare().run()
        assert torch.allclose(torch.tensor(outcome.losses), torch.tensor(alone.losses), rtol=1e-4)
        assert_same(outcome.folder, alone.folder)


def test_a_finished_adapter_leaves_the_batch(adapters, job):
    ready = job(adapters(3)).prepare()
    steps = []
    ready.run(lambda now: steps.append(now.adapter) if isinstance(now, Progress) else None)
    assert [steps.count(f"a{n}") for n in range(3)] == [3, 4, 5]
    assert steps[-1] == "a2"


def test_a_resumed_run_gives_the_same_bits(adapters, job):
    chosen = adapters(3, 0.3)
    whole = job(chosen, "whole").prepare().run()

    def stop(now) -> None:
        if isinstance(now, Progress) and now.adapter == "a1" and now.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job(chosen).prepare().run(stop)
    resumed = job(chosen, resume=True).prepare().run()
    for before, after in zip(whole, resumed, strict=True):
        assert before.losses == after.losses
        assert_same(before.folder, after.folder, exactly=True)


def test_a_run_that_is_asked_for_something_else_is_not_resumed(adapters, job):
    chosen = adapters(2)
    with pytest.raises(KeyboardInterrupt):
        job(chosen).prepare().run(stop_at(2))
    with pytest.raises(Exception, match=r"`adapters.a0.recipe.lr` was 0.01 and is 0.5"):
        job(adapters(2, lr=0.5), resume=True).prepare()


def stop_at(step: int):
    def stop(now) -> None:
        if isinstance(now, Progress) and now.step == step:
            raise KeyboardInterrupt

    return stop


def test_nothing_to_resume_is_said(adapters, job):
    with pytest.raises(Exception, match="there is no checkpoint to resume from"):
        job(adapters(1), resume=True).prepare()


def test_a_loss_that_is_not_finite_ends_one_adapter_and_spares_the_others(adapters, job):
    chosen = adapters(3)
    ready = job(chosen).prepare()
    (spoilt,) = (e for e in ready.entrants if e.name == "a1")
    events = []

    def spoil(now) -> None:
        events.append(now)
        if isinstance(now, Progress) and now.adapter == "a1" and now.step == 1:
            kept.extend(spoilt.lane.values())
            with torch.no_grad():
                spoilt.lane.parameters[0].fill_(float("nan"))

    kept: list[torch.Tensor] = []
    with pytest.raises(TrainingError, match=r"adapter `a1`, step 2 of 4: the loss is nan.*kept as"):
        ready.run(spoil)
    ends = {e.adapter: (e.why, e.kept) for e in events if isinstance(e, Finished)}
    assert ends == {"a0": ("done", 3), "a1": ("failed", 1), "a2": ("done", 5)}
    for name in ("a0", "a2"):
        own = next(a for a in chosen if a.name == name)
        (alone,) = job([own], f"alone-{name}").prepare().run()
        assert_same(Path(ready.job.output, name), alone.folder)
    assert not Path(ready.job.output, "a1", WEIGHTS).exists()


def test_an_adapter_that_gets_no_better_stops_and_keeps_its_best(adapters, job, tmp_path):
    (own,) = adapters(1, steps=40, lr=0.5, schedule="constant")
    held_out = str(write_lines(tmp_path / "held.jsonl", pair_rows()[-3:]))
    watched = AdapterJob(
        own.data, own.config, own.recipe, own.name, held_out, watch=Watch(every=2, patience=2)
    )
    ready = job([watched]).prepare()
    found = []
    (outcome,) = ready.run(lambda now: found.append(now) if isinstance(now, Evaluated) else None)
    assert outcome.why == "stopped"
    assert len(outcome.losses) < 40
    losses = {e.step: e.values["loss"] for e in found if e.step}
    assert outcome.kept_step == min(losses, key=losses.__getitem__) < len(outcome.losses)
    again = ready.entrants[0].held_out.measure(ready.model)["loss"]
    assert again == pytest.approx(losses[outcome.kept_step], rel=1e-5)


def test_a_full_disk_costs_checkpoints_and_not_the_run(adapters, job, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("multigraft.train.saves.write_tensors", full)
    ready = job(adapters(2), save_every=2).prepare()
    with pytest.warns(MultigraftWarning, match="No space left on device.*Free some space"):
        outcomes = ready.run()
    assert all((outcome.folder / WEIGHTS).is_file() for outcome in outcomes)
    assert not list(Path(ready.job.output, "checkpoints").glob("*"))


def test_a_checkpoint_that_cannot_be_read_is_passed_over(adapters, job):
    chosen = adapters(1, steps=6)
    whole = job(chosen, "whole").prepare().run()
    with pytest.raises(KeyboardInterrupt):
        job(chosen, save_every=2).prepare().run(stop_at(5))
    folder = Path(job(chosen).output, "checkpoints")
    newest = max(folder.glob("round-*"))
    (newest / "state.json").write_text("{")
    with pytest.warns(MultigraftWarning, match="the checkpoint cannot be read.*passed over"):
        ready = job(chosen, save_every=2, resume=True).prepare()
    assert ready.found is not None and ready.found.round < int(newest.name.removeprefix("round-"))
    (outcome,) = ready.run()
    assert outcome.losses == whole[0].losses


KILLED = """
import sys
from multigraft import cli
cli.main(["train", sys.argv[1], *sys.argv[2:]])
"""


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_with_the_same_bits(base_dir, tmp_path):
    data = write_lines(tmp_path / "data.jsonl", pair_rows())
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {base_dir}\ndata: {data}\nsteps: 60\nbatch_size: 2\nsave_every: 5\ndropout: 0.1\n"
        "adapters:\n  - {name: one, rank: 2}\n  - {name: two, rank: 4, lr: 1e-3, seed: 3}\n"
    )

    def command(output: str, *more: str) -> list[str]:
        words = [str(file), "-q", "--output", str(tmp_path / output), *more]
        return [sys.executable, "-c", KILLED, *words]

    subprocess.run(command("whole"), check=True)
    process = subprocess.Popen(command("killed"))
    folder = tmp_path / "killed" / "checkpoints"
    deadline = time.monotonic() + 60
    while not (folder / "round-000010").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "one" / WEIGHTS).exists()
    subprocess.run(command("killed", "--resume"), check=True)
    for name in ("one", "two"):
        assert_same(tmp_path / "whole" / name, tmp_path / "killed" / name, exactly=True)
        losses = [
            [
                json.loads(line)["loss"]
                for line in (tmp_path / output / name / "train_log.jsonl").open()
            ]
            for output in ("whole", "killed")
        ]
        assert losses[0] == losses[1] and len(losses[0]) == 60
