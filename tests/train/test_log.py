"""A run's log lies beside the adapter that it tells of, and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from multigraft import CheckpointError, LoraConfig, MultigraftWarning, TrainingError
from multigraft.train import Job, Progress, Recipe
from multigraft.train.log import LOG_NAME, UNFINISHED, RunLog
from tests.tiny_base import pair_rows, write_lines
from tests.train.jobs import one, only


@pytest.fixture
def job(base_dir, tmp_path):
    data = write_lines(tmp_path / "data.jsonl", pair_rows())

    def make(**options: object) -> Job:
        return one(
            **{
                "model": str(base_dir),
                "data": str(data),
                "output": str(tmp_path / "out"),
                "config": LoraConfig(r=2, target_modules=["q_proj"]),
                "recipe": Recipe(steps=3, batch_size=2),
                "device": "cpu",
                **options,
            }
        )

    return make


def step(number: int) -> Progress:
    return Progress("a", number, 3, 1.5 / number, 1e-3, 0.1, 10 * number, 0.5 * number)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_step_is_a_line_beside_the_adapter(job):
    outcome = only(job(name="dates").prepare().run())
    found = lines(outcome.folder / LOG_NAME)
    assert [line["step"] for line in found] == [1, 2, 3]
    assert [line["loss"] for line in found] == outcome.losses
    assert {line["adapter"] for line in found} == {"dates"}
    assert not (outcome.folder / UNFINISHED).exists()


def test_it_is_written_as_training_goes(job):
    seen = []
    ready = job().prepare()

    def look(now) -> None:
        if isinstance(now, Progress):
            seen.append(len(lines(Path(ready.job.output, UNFINISHED))))

    ready.run(look)
    assert seen == [1, 2, 3]


def test_a_run_that_fails_without_checkpoints_leaves_nothing(job, tmp_path):
    ready = job(save_every=0).prepare()

    def broken(now: Progress) -> None:
        if now.step == 2:
            raise TrainingError("the loss is nan")

    with pytest.raises(TrainingError):
        ready.run(broken)
    assert not (tmp_path / "out").exists()


def test_a_disk_that_refuses_the_adapter_gets_no_log_of_it(job, tmp_path, monkeypatch):
    ready = job().prepare()

    def refused(*_: object, **__: object) -> None:
        raise CheckpointError("the disk is full")

    monkeypatch.setattr(ready.model, "save_pretrained", refused)
    with pytest.raises(CheckpointError):
        ready.run()
    assert not (tmp_path / "out" / LOG_NAME).exists()
    assert (tmp_path / "out" / "checkpoints" / "round-000003" / "default").is_dir()


def test_an_older_adapters_log_stays_until_the_new_one_is_saved(job, tmp_path):
    job().prepare().run()
    older = (tmp_path / "out" / LOG_NAME).read_bytes()
    ready = job(overwrite=True, save_every=0).prepare()

    def interrupted(now: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ready.run(interrupted)
    assert "checkpoints are switched off" in ready.rescue()
    assert (tmp_path / "out" / LOG_NAME).read_bytes() == older
    assert not (tmp_path / "out" / UNFINISHED).exists()


def test_a_run_that_is_taken_up_goes_on_with_its_log(job, tmp_path):
    whole = only(job(output=str(tmp_path / "whole")).prepare().run())

    def interrupted(now: Progress) -> None:
        if isinstance(now, Progress) and now.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job().prepare().run(interrupted)
    outcome = only(job(resume=True).prepare().run())
    found = lines(tmp_path / "out" / LOG_NAME)
    assert [line["step"] for line in found] == [1, 2, 3]
    assert [line["loss"] for line in found] == whole.losses == outcome.losses


def test_half_a_line_of_a_killed_run_is_left_out(tmp_path):
    (tmp_path / UNFINISHED).write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    log = RunLog(tmp_path, resumed_at=2)
    log(step(3))
    assert [line["step"] for line in lines(tmp_path / UNFINISHED)] == [1, 2, 3]


def test_a_disk_that_refuses_is_warned_of_once(tmp_path):
    (tmp_path / "file").write_text("")
    log = RunLog(tmp_path / "file" / "out")
    with pytest.warns(MultigraftWarning, match="the log of this run stops here") as caught:
        log(step(1))
        log(step(2))
    assert len(caught) == 1
    log.keep()
    log.drop()


def test_dropping_takes_only_folders_that_it_made(tmp_path):
    log = RunLog(tmp_path / "a" / "b")
    log(step(1))
    (tmp_path / "a" / "mine").write_text("")
    log.drop()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine"]
