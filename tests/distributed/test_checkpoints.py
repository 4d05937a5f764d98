"""A run's state is saved by N ranks and goes on on M; and is whole whatever happens."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import FileSystemReader

from multigraft import CheckpointError
from multigraft.distributed import has_sharded, load_sharded, save_sharded
from tests.distributed import checkpoint_jobs as jobs
from tests.distributed.tiny import adapted, base
from tests.distributed.world import World


def assert_same(found: jobs.Result, expected: jobs.Result) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for key, value in expected[1].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-3, atol=1e-4, msg=key)


@pytest.fixture(scope="module")
def whole() -> jobs.Result:
    """Steps 3 to 5 of a run that is not interrupted."""
    (losses, state), _, _ = jobs.steps("alone", 0, 6, None, None)
    return losses[3:], state


@pytest.mark.parametrize("how", ["replicas", "replicated", "sharded"])
def test_two_ranks_go_on_from_two(two: World, tmp_path: Path, whole: jobs.Result, how: str) -> None:
    two.run(jobs.steps, how, 0, 3, None, str(tmp_path / "state"))
    for found, rest, in_parts in two.run(jobs.steps, how, 3, 6, str(tmp_path / "state"), None):
        assert_same(found, whole)
        assert rest == {"step": 3, "betas": (0.9, {"deep": [1, None]})}
        assert in_parts == (how == "sharded")


def test_one_process_goes_on_from_two_ranks(two: World, tmp_path: Path, whole: jobs.Result) -> None:
    two.run(jobs.steps, "sharded", 0, 3, None, str(tmp_path / "state"))
    assert_same(jobs.steps("alone", 3, 6, str(tmp_path / "state"), None)[0], whole)


def test_two_ranks_go_on_from_one_process(two: World, tmp_path: Path, whole: jobs.Result) -> None:
    jobs.steps("alone", 0, 3, None, str(tmp_path / "state"))
    for found, *_ in two.run(jobs.steps, "sharded", 3, 6, str(tmp_path / "state"), None):
        assert_same(found, whole)


def test_four_ranks_go_on_from_two(
    two: World, four: World, tmp_path: Path, whole: jobs.Result
) -> None:
    two.run(jobs.steps, "sharded", 0, 3, None, str(tmp_path / "state"))
    for found, *_ in four.run(jobs.steps, "sharded", 3, 6, str(tmp_path / "state"), None):
        assert_same(found, whole)


def test_the_base_is_not_saved(tmp_path: Path) -> None:
    model = adapted(base(torch.float32), "a")
    save_sharded({"model": model}, tmp_path / "state")
    stored = FileSystemReader(tmp_path / "state").read_metadata().state_dict_metadata
    assert len(stored) == 28
    assert all(".lora_" in name for name in stored)


def test_saving_again_replaces_the_state(tmp_path: Path) -> None:
    for step in (1, 2):
        save_sharded({"step": step, "values": torch.full((3,), step)}, tmp_path / "state")
    found = load_sharded({}, tmp_path / "state")
    assert found["step"] == 2
    assert found["values"].tolist() == [2, 2, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_save_that_was_cut_short_between_its_renames_is_undone(tmp_path: Path) -> None:
    save_sharded({"step": 1}, tmp_path / "state")
    shutil.move(tmp_path / "state", tmp_path / ".state.old")
    assert has_sharded(tmp_path / "state")
    assert load_sharded({}, tmp_path / "state") == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_save_that_was_cut_short_before_leaves_the_old_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_sharded({"step": 1}, tmp_path / "state")

    def fails(*args: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("multigraft.distributed.checkpoints._flush", fails)
        with pytest.raises(CheckpointError, match=r"no space left.*What was there is unchanged"):
            save_sharded({"step": 2}, tmp_path / "state")
    assert load_sharded({}, tmp_path / "state") == {"step": 1}


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"`a/b` \(=set\) cannot be saved"):
        save_sharded({"a": {"b": {1}}}, tmp_path / "state")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("how", "message"),
    [("names", "lacks the tensors `model/other/"), ("r", "of another shape are `model/a/")],
)
def test_the_state_of_another_run_is_refused(
    two: World, tmp_path: Path, how: str, message: str
) -> None:
    place = str(tmp_path / "state")
    for text in two.run(jobs.refused, place, place, how):
        assert message in text
        assert "Nothing was changed" in text


def test_no_state_is_refused(tmp_path: Path) -> None:
    assert not has_sharded(tmp_path / "state")
    with pytest.raises(CheckpointError, match="holds no whole state of a run"):
        load_sharded({"a": nn.Linear(1, 1)}, tmp_path / "state")
