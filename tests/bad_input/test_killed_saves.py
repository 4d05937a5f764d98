"""A process that ends in the middle of a save, as SIGKILL or a power cut would end it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from multigraft import CheckpointError, PeftModel, atomic
from tests.bad_input.saving import assert_loads_as, contents, trained
from tests.weaknesses import nets

KILLED = """
    import os, sys
    from pathlib import Path
    from multigraft import atomic, checkpoint
    from tests.bad_input.saving import trained

    where, folder = sys.argv[1:]
    model = trained(seed=2)
    if where == "before the weights":
        checkpoint.write_tensors = lambda *_: os._exit(9)
    elif where == "half-way through the weights":
        write = checkpoint.write_tensors
        def half(tensors, path):
            write(tensors, path)
            os.truncate(path, 100)
            os._exit(9)
        checkpoint.write_tensors = half
    elif where == "between the files":
        Path.write_text = lambda *_, **__: os._exit(9)
    else:  # before this rename of six: two files of each adapter
        rename, left = atomic.Stage.put_in_place, [int(where)]
        def counted(stage, name):
            if not left[0]:
                os._exit(9)
            left[0] -= 1
            rename(stage, name)
        atomic.Stage.put_in_place = counted
    model.save_pretrained(folder)
"""
PLACES = ["before the weights", "half-way through the weights", "between the files", "0"]


def kill(where: str, folder: Path) -> None:
    """Save into the folder in a process that is gone in the middle of it."""
    command = [sys.executable, "-c", textwrap.dedent(KILLED), where, str(folder)]
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}"}
    done = subprocess.run(command, cwd=root, env=environment, check=False)
    assert done.returncode == 9


@pytest.fixture(scope="module", params=PLACES)
def survivor(request: pytest.FixtureRequest) -> Iterator[tuple[Path, dict[str, bytes | None]]]:
    """A folder of adapters after a process was killed in saving over it, and what it held."""
    with tempfile.TemporaryDirectory() as name:
        trained(seed=1).save_pretrained(name)
        files = contents(Path(name))
        kill(request.param, Path(name))
        yield Path(name), files


def test_a_kill_half_way_leaves_the_old_files_whole(
    survivor: tuple[Path, dict[str, bytes | None]],
) -> None:
    folder, files = survivor
    after = contents(folder)
    assert {name: after[name] for name in files} == files
    left = set(after) - set(files)
    assert left, "the process was killed before it began to save"
    assert all(atomic.PREFIX in name for name in left)
    assert not any(Path(name).name in ("adapter_config.json", "README.md") for name in left)


def test_a_kill_half_way_leaves_adapters_that_load_as_before(
    survivor: tuple[Path, dict[str, bytes | None]],
) -> None:
    folder, _ = survivor
    assert_loads_as(trained(seed=1), folder)


def test_the_next_save_removes_what_a_killed_one_left(
    survivor: tuple[Path, dict[str, bytes | None]],
) -> None:
    folder, files = survivor
    trained(seed=3).save_pretrained(folder)
    assert set(contents(folder)) == set(files)


def test_what_a_live_writer_holds_is_not_swept_away(tmp_path: Path) -> None:
    stage = atomic.Stage(tmp_path)
    stage.write("slow.txt", lambda path: atomic.write_utf8(path, "text"))
    trained().save_pretrained(tmp_path)
    stage.put_in_place("slow.txt")
    stage.remove()
    assert (tmp_path / "slow.txt").read_text() == "text"
    assert not list(tmp_path.glob(f"{atomic.PREFIX}*"))


@pytest.mark.parametrize("renames", [1, 2, 3, 5])
def test_a_kill_between_the_renames_is_undone_by_the_next_who_loads(
    renames: int, tmp_path: Path
) -> None:
    trained(seed=1).save_pretrained(tmp_path)
    files = contents(tmp_path)
    kill(str(renames), tmp_path)
    assert contents(tmp_path)["adapter_model.safetensors"] != files["adapter_model.safetensors"]
    assert_loads_as(trained(seed=1), tmp_path)
    assert contents(tmp_path) == files


def test_a_kill_between_the_renames_of_a_first_save_leaves_no_half_of_an_adapter(
    tmp_path: Path,
) -> None:
    kill("3", tmp_path)
    for folder in (tmp_path, tmp_path / "b", tmp_path / "c"):
        with pytest.raises(CheckpointError, match=r"holds no adapter_config\.json"):
            PeftModel.from_pretrained(nets.net(), folder)
    assert not [name for name, data in contents(tmp_path).items() if data is not None]


def test_an_undoing_that_is_itself_cut_short_is_finished_by_the_next(tmp_path: Path) -> None:
    trained(seed=1).save_pretrained(tmp_path)
    files = contents(tmp_path)
    kill("2", tmp_path)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(atomic, "_remove", interrupted)
        PeftModel.from_pretrained(nets.net(), tmp_path)
    assert_loads_as(trained(seed=1), tmp_path)
    assert contents(tmp_path) == files


def test_an_undoing_that_the_disk_refuses_is_an_error_rather_than_half_an_adapter(
    tmp_path: Path,
) -> None:
    trained(seed=1).save_pretrained(tmp_path)
    kill("1", tmp_path)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckpointError) as caught:
        patch.setattr(os, "replace", refuse)
        PeftModel.from_pretrained(nets.net(), tmp_path)
    assert "a save was cut short here" in str(caught.value)
    assert "Make the folder writable, or save again" in str(caught.value)
    assert_loads_as(trained(seed=1), tmp_path)


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def refuse(*_: object) -> None:
    raise PermissionError(13, "Permission denied")
