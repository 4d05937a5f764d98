"""A full disk, a kill, a path that is none: the old files stay, and nothing is left lying about."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from multigraft import (
    AdapterNameError,
    CheckpointError,
    LoraConfig,
    PeftConfig,
    StateError,
    atomic,
)
from multigraft.writing import write_tensors
from tests.bad_input.saving import assert_loads_as, contents, trained
from tests.weaknesses import nets

Fault = Callable[[pytest.MonkeyPatch, int], None]


def failing(function: Callable[..., Any], at: int, error: OSError) -> Callable[..., Any]:
    """The function, until its call number ``at`` (from 0) raises."""
    calls = iter(range(1000))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            raise error
        return function(*args, **kwargs)

    return call


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_at_weights(patch: pytest.MonkeyPatch, at: int) -> None:
    patch.setattr("multigraft.checkpoint.write_tensors", failing(write_tensors, at, full()))


def full_after_half_of_the_weights(patch: pytest.MonkeyPatch, at: int) -> None:
    calls = iter(range(1000))

    def write(tensors: Any, path: Path) -> None:
        write_tensors(tensors, path)
        if next(calls) == at:
            os.truncate(path, os.path.getsize(path) // 2)
            raise full()

    patch.setattr("multigraft.checkpoint.write_tensors", write)


def full_at_texts(patch: pytest.MonkeyPatch, at: int) -> None:
    patch.setattr(Path, "write_text", failing(Path.write_text, at, full()))


def full_at_flush(patch: pytest.MonkeyPatch, at: int) -> None:
    patch.setattr(os, "fsync", failing(os.fsync, at, full()))


def refused_rename(patch: pytest.MonkeyPatch, at: int) -> None:
    replace, calls = os.replace, iter(range(1000))

    def call(source: Any, target: Any) -> None:
        # Only renames to where adapters lie count: putting old files back must be possible.
        if atomic.PREFIX not in str(target) and ".old" not in str(source) and next(calls) == at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(source, target)

    patch.setattr(os, "replace", call)


def no_room_for_a_folder(patch: pytest.MonkeyPatch, at: int) -> None:
    patch.setattr(tempfile, "mkdtemp", failing(tempfile.mkdtemp, at, full()))


def no_lock(patch: pytest.MonkeyPatch, at: int) -> None:
    patch.setattr(atomic, "_lock", failing(atomic._lock, at, full()))


FAULTS: list[tuple[Fault, int]] = [
    *[(full_at_weights, at) for at in range(3)],
    *[(full_after_half_of_the_weights, at) for at in range(3)],
    *[(full_at_texts, at) for at in range(3)],
    *[(full_at_flush, at) for at in (0, 1, 2, 5, 6, 7, 8)],  # six files, then three folders
    *[(refused_rename, at) for at in range(6)],
    *[(no_room_for_a_folder, at) for at in range(3)],
    *[(no_lock, at) for at in range(3)],
]
faults = pytest.mark.parametrize(
    ("fault", "at"), FAULTS, ids=lambda v: v if isinstance(v, int) else v.__name__
)


@faults
def test_a_disk_that_fails_leaves_the_old_files_and_nothing_else(
    fault: Fault, at: int, tmp_path: Path
) -> None:
    trained(seed=1).save_pretrained(tmp_path / "out")
    model = trained(seed=2)
    files, facts = contents(tmp_path), nets.known(model)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckpointError) as caught:
        fault(patch, at)
        model.save_pretrained(tmp_path / "out")
    assert contents(tmp_path) == files
    nets.assert_as_before(model, facts)
    message = str(caught.value)
    assert str(tmp_path / "out") in message
    assert (
        "Files that were there before are unchanged; free some space or choose another" in message
    )


@faults
def test_a_disk_that_fails_at_the_first_save_leaves_no_trace(
    fault: Fault, at: int, tmp_path: Path
) -> None:
    model = trained()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckpointError):
        fault(patch, at)
        model.save_pretrained(tmp_path / "new" / "deep")
    assert contents(tmp_path) == {}
    model.save_pretrained(tmp_path / "new" / "deep")
    assert_loads_as(model, tmp_path / "new" / "deep")


def test_an_interrupt_half_way_leaves_the_old_files_and_nothing_else(tmp_path: Path) -> None:
    trained(seed=1).save_pretrained(tmp_path)
    model, files = trained(seed=2), contents(tmp_path)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("multigraft.checkpoint.write_tensors", interrupted)
        model.save_pretrained(tmp_path)
    assert contents(tmp_path) == files


def test_a_file_system_without_second_names_puts_old_files_back_from_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    trained(seed=1).save_pretrained(tmp_path)
    model, files = trained(seed=2), contents(tmp_path)
    monkeypatch.setattr(os, "link", unsupported)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckpointError):
        refused_rename(patch, 4)
        model.save_pretrained(tmp_path)
    assert contents(tmp_path) == files
    model.save_pretrained(tmp_path)
    assert contents(tmp_path).keys() == files.keys()
    assert contents(tmp_path) != files


def test_a_folder_that_cannot_be_flushed_is_saved_into_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def picky(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", picky)
    model = trained()
    model.save_pretrained(tmp_path)
    assert_loads_as(model, tmp_path)


# Paths that cannot be saved to.


@pytest.mark.parametrize("below", ["", "sub", "sub/deeper"])
def test_saving_to_or_below_a_file_is_refused_and_the_file_stays(
    below: str, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("mine")
    model = trained()
    facts = nets.known(model)
    with pytest.raises(CheckpointError) as caught:
        model.save_pretrained(tmp_path / "taken" / below)
    assert str(tmp_path / "taken") in str(caught.value)
    assert "directory" in str(caught.value)
    assert contents(tmp_path) == {"taken": b"mine"}
    nets.assert_as_before(model, facts)


def test_a_file_where_an_adapters_folder_must_be_stops_the_whole_save(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("mine")
    with pytest.raises(CheckpointError, match=r"(?i)not a directory.*b'"):
        trained().save_pretrained(tmp_path)
    assert contents(tmp_path) == {"b": b"mine"}


def test_a_folder_where_a_file_must_be_stops_the_whole_save(tmp_path: Path) -> None:
    (tmp_path / "c" / "adapter_config.json").mkdir(parents=True)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="directory"):
        trained().save_pretrained(tmp_path)
    assert contents(tmp_path) == before


def test_a_read_only_directory_is_refused_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(seed=1).save_pretrained(tmp_path)
    before = contents(tmp_path)
    tmp_path.chmod(0o555)
    # An administrator may write there all the same, so the refusal is what the system would say.
    denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path))
    monkeypatch.setattr(os, "mkdir", failing(os.mkdir, 0, denied))
    with pytest.raises(CheckpointError, match=f"Permission denied.*{tmp_path.name}"):
        trained(seed=2).save_pretrained(tmp_path)
    tmp_path.chmod(0o755)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["defualt", "", "../b", "B"])
def test_an_adapter_that_is_not_there_stops_the_whole_save(name: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterNameError, match="There are: `default`, `b`, `c`"):
        trained().save_pretrained(tmp_path / "out", selected_adapters=["b", name])
    assert contents(tmp_path) == {}


def test_a_model_without_adapters_has_nothing_to_save(tmp_path: Path) -> None:
    model = trained()
    model.unload()
    with pytest.raises(StateError, match="no adapters; add one first"):
        model.save_pretrained(tmp_path / "out")
    assert contents(tmp_path) == {}


def test_tensors_without_values_are_refused_before_a_file_is_touched(tmp_path: Path) -> None:
    model = trained(seed=1)
    model.save_pretrained(tmp_path)
    before = contents(tmp_path)
    on_meta = LoraConfig(r=2, target_modules=["up"])
    model.base_model.add_adapter("empty", on_meta, low_cpu_mem_usage=True)
    with pytest.raises(CheckpointError, match=r"`blocks\.0\.up\.lora_A\.weight` holds no values"):
        model.save_pretrained(tmp_path)
    assert contents(tmp_path) == before


def test_pickles_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"`safe_serialization` \(=False\).*Leave it at True"):
        trained().save_pretrained(tmp_path, safe_serialization=False)
    assert contents(tmp_path) == {}


def test_the_users_own_files_and_card_stay(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("my card")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("note")
    trained().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my card"
    assert (tmp_path / "notes" / "a.txt").read_text() == "note"


def test_a_config_alone_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    LoraConfig(r=2, target_modules=["up"]).save_pretrained(tmp_path)
    before = contents(tmp_path)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckpointError, match="unchanged"):
        full_at_texts(patch, 0)
        LoraConfig(r=3, target_modules=["up"]).save_pretrained(tmp_path)
    assert contents(tmp_path) == before
    assert PeftConfig.from_pretrained(tmp_path).r == 2  # type: ignore[attr-defined]
