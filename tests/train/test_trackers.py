"""Curves reach the trackers that are asked for; one that fails costs its curves alone."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from multigraft import LoraConfig, MissingExtraError, MultigraftWarning, UnsupportedError
from multigraft.train import REPORT, Recipe
from tests.tiny_base import pair_rows, write_lines
from tests.train.jobs import one


@pytest.fixture
def job(base_dir, tmp_path):
    data = str(write_lines(tmp_path / "data.jsonl", pair_rows()))

    def make(*trackers: str, **options: object):
        return one(
            model=str(base_dir),
            data=data,
            output=str(tmp_path / "out"),
            config=LoraConfig(r=2, target_modules=["q_proj"]),
            recipe=Recipe(steps=3, batch_size=2),
            name="dates",
            eval_split=0.3,
            log_to=trackers,
            **options,
        )

    return make


class Service:
    """A stand-in for a package with init, log and finish."""

    def __init__(self, broken: bool = False) -> None:
        self.rows: list[dict] = []
        self.config: dict = {}
        self.is_finished = False
        self.broken = broken

    def init(self, project, name, config):
        self.config = config
        return SimpleNamespace(log=self.log, finish=self.finish)

    def log(self, row) -> None:
        if self.broken:
            raise ConnectionError("no network")
        self.rows.append(row)

    def finish(self) -> None:
        self.is_finished = True


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_hosted_tracker_gets_steps_and_evaluations(job, monkeypatch, name):
    service = Service()
    monkeypatch.setitem(sys.modules, name, service)
    (outcome,) = job(name).prepare().run()
    losses = [row["dates/loss"] for row in service.rows if "dates/loss" in row]
    held_out = [row["dates/eval/loss"] for row in service.rows if "dates/eval/loss" in row]
    assert losses == outcome.losses
    assert (held_out[0], held_out[-1]) == outcome.eval_loss
    assert service.config["adapters"]["dates"]["recipe"]["steps"] == 3
    assert service.is_finished


def test_a_service_that_fails_is_warned_of_once_and_the_run_goes_on(job, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", Service(broken=True))
    with pytest.warns(MultigraftWarning, match="wandb takes no more .*no network") as caught:
        (outcome,) = job("wandb").prepare().run()
    assert len([w for w in caught if "takes no more" in str(w.message)]) == 1
    assert len(outcome.losses) == 3


def test_tensorboard_gets_a_folder_for_each_adapter(job, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (outcome,) = job("tensorboard").prepare().run()
    found = EventAccumulator(str(tmp_path / "out" / "tensorboard" / "dates"))
    found.Reload()
    assert [event.value for event in found.Scalars("loss")] == pytest.approx(outcome.losses)
    assert [event.step for event in found.Scalars("eval/loss")] == [0, 3]


def test_a_tracker_whose_package_is_missing_is_told_before_training(job, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError, match="pip install wandb"):
        job("wandb").prepare()


def test_an_unknown_tracker_is_told_with_the_nearest(job):
    with pytest.raises(UnsupportedError, match="Nearest: `tensorboard`"):
        job("tensorbord").prepare()


def test_the_report_at_the_end_has_the_curves(job, tmp_path):
    job(report=True).prepare().run()
    page = (tmp_path / "out" / REPORT).read_text("utf-8")
    assert "dates, held out" in page
