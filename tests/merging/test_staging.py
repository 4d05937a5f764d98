"""A folder is there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from multigraft.errors import CheckpointError, StateError
from multigraft.merging import staging
from multigraft.merging.staging import new_folder, require_space, sweep


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_name_comes_with_the_end_of_the_block(tmp_path: Path):
    target = tmp_path / "deep" / "out"
    with new_folder(target) as stage:
        (stage / "file").write_text("x")
        assert not target.exists() and stage.parent == target.parent
    assert names(target) == ["file"] and names(target.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_whatever_fails_leaves_nothing(tmp_path: Path, error: type[BaseException]):
    with pytest.raises(error), new_folder(tmp_path / "out") as stage:
        (stage / "file").write_text("x")
        raise error
    assert names(tmp_path) == []


def test_a_disk_that_refuses_is_told(tmp_path: Path):
    with (
        pytest.raises(CheckpointError, match="it could not be written"),
        new_folder(tmp_path / "o"),
    ):
        raise OSError(28, "No space left on device")
    assert names(tmp_path) == []


def test_what_is_there_stays_unless_it_is_empty_or_may_go(tmp_path: Path):
    target = tmp_path / "out"
    target.mkdir()
    with new_folder(target) as stage:
        (stage / "new").touch()
    with pytest.raises(StateError, match="--overwrite"), new_folder(target):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(StateError), new_folder(tmp_path / "file", overwrite=True):
        pass
    with new_folder(target, overwrite=True) as stage:
        (stage / "newer").touch()
    assert names(target) == ["newer"] and names(tmp_path) == ["file", "out"]


def test_the_old_folder_comes_back_when_the_rename_fails(tmp_path: Path, monkeypatch):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").touch()
    rename = os.rename

    def refuse(source: Path, to: Path) -> None:
        if ".making-" in str(source):
            raise OSError(5, "Input/output error")
        rename(source, to)

    monkeypatch.setattr(staging.os, "rename", refuse)
    with pytest.raises(CheckpointError), new_folder(target, overwrite=True):
        pass
    assert names(target) == ["old"] and names(tmp_path) == ["out"]


def test_folders_of_writers_that_live_are_not_swept(tmp_path: Path):
    target = tmp_path / "out"
    with new_folder(target) as stage:
        sweep(target)
        assert (stage / staging.LOCK).exists()
        dead = tmp_path / ".out.making-dead"
        dead.mkdir()
        (dead / staging.LOCK).touch()
        (tmp_path / ".other.making-dead").mkdir()
        sweep(target)
        assert not dead.exists() and stage.exists()
    assert names(tmp_path) == [".other.making-dead", "out"]


def test_room_is_looked_for_where_the_folder_will_be(tmp_path: Path):
    require_space(tmp_path / "not" / "there" / "yet", 1)
    with pytest.raises(CheckpointError, match=r"1,000,000,000\.00 GB are needed"):
        require_space(tmp_path, 10**18)
