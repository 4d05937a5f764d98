"""Files made to harm, through every way to load an adapter: refused, and nothing changes."""

from __future__ import annotations

import contextlib
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from multigraft import CheckpointError, ConfigError, MultigraftError, PeftModel
from tests.bad_input.loading import SETTINGS, WEIGHTS, refused, resettle, ways
from tests.weaknesses import nets


def reheader(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Give the weights another header, and leave their bytes."""
    data = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def last(header: dict[str, Any]) -> dict[str, Any]:
    """The entry of the tensor that the file ends with."""
    entries = [value for key, value in header.items() if key != "__metadata__"]
    return max(entries, key=lambda each: each["data_offsets"][1])


def beyond(header: dict[str, Any]) -> None:
    entry = last(header)
    entry["shape"] = [1 << 30]
    entry["data_offsets"][1] = entry["data_offsets"][0] + (1 << 32)


def absurd(header: dict[str, Any]) -> None:
    last(header)["shape"] = [1 << 60, 1 << 60]


def elsewhere(header: dict[str, Any]) -> None:
    name = next(key for key in header if key != "__metadata__")
    header[f"../../{name}"] = header.pop(name)


@ways
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (beyond, "bytes of tensors, and"),
        (absurd, "absurd shape"),
        (elsewhere, "named like a path to another folder"),
    ],
    ids=["beyond the file", "absurd", "elsewhere"],
)
def test_a_header_that_lies_is_refused(
    change: Callable[[dict[str, Any]], object],
    words: str,
    way: Callable[..., Any],
    folder: Path,
) -> None:
    reheader(folder, change)
    assert words in refused(CheckpointError, *way(folder), folder)


@ways
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"r": ' + " " * (3 << 20) + "2}", "more than 2,097,152 bytes"),
        ('{"peft_type": ' * 50 + '"LORA"' + "}" * 50, "nested more than 32 levels deep"),
    ],
    ids=["megabytes", "deep"],
)
def test_a_config_beyond_all_measure_is_refused(
    text: str, words: str, way: Callable[..., Any], folder: Path
) -> None:
    (folder / SETTINGS).write_text(text)
    assert words in refused(ConfigError, *way(folder), folder)


NAMES = [f"name_{number}" for number in range(10_000)]
MANY: dict[str, dict[str, Any]] = {
    "target_modules": {"target_modules": [*NAMES, "up", "conv", "embed"]},
    "exclude_modules": {"exclude_modules": NAMES},
    "modules_to_save": {"modules_to_save": [*NAMES, "head"]},
    "target_parameters": {"target_parameters": NAMES},
    "rank_pattern": {"rank_pattern": dict.fromkeys(NAMES, 2)},
    "alpha_pattern": {"alpha_pattern": dict.fromkeys(NAMES, 2)},
    "layers_pattern": {"layers_pattern": NAMES, "layers_to_transform": [0]},
    "layers_to_transform": {"layers_to_transform": list(range(10_000))},
    "unknown keys": dict.fromkeys(NAMES),
}


@pytest.mark.parametrize("which", MANY)
def test_a_config_of_very_many_names_is_dealt_with_in_time(which: str, folder: Path) -> None:
    resettle(folder, **MANY[which])
    start = time.perf_counter()
    with contextlib.suppress(MultigraftError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        PeftModel.from_pretrained(nets.net(), folder)
    assert time.perf_counter() - start < 10


@ways
@pytest.mark.parametrize("name", [WEIGHTS, SETTINGS])
def test_a_link_out_of_the_folder_is_refused(
    name: str, way: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    os.replace(folder / name, tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    message = refused(CheckpointError, *way(folder), folder)
    assert f"{folder / name} leads out of {folder}" in message


def test_a_subfolder_elsewhere_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(CheckpointError, match="leads out of"):
        PeftModel.from_pretrained(nets.net(), tmp_path / "other", subfolder=f"../{folder.name}")


def test_a_snapshot_of_the_hubs_cache_is_loaded(folder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--some--adapter"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    os.replace(folder, repository / "blobs")
    for name in (WEIGHTS, SETTINGS):
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    assert PeftModel.from_pretrained(nets.net(), snapshot).active_adapters == ["default"]


# What claims to be left by a save that was cut short.


def left_by_a_save(folder: Path, note: object) -> Path:
    """A staging folder with this note."""
    place = folder / ".saving-evil"
    place.mkdir()
    (place / "lock").touch()
    (place / "renaming.json").write_text(note if isinstance(note, str) else json.dumps(note))
    return place


@pytest.mark.parametrize(
    "note",
    [
        {"../precious": False},
        {"sub/../../precious": False},
        {"..": True},
        ["x"],
        "[" * 100_000,
        "no JSON",
        '{"a": "' + "x" * (2 << 20) + '"}',
    ],
    ids=lambda note: ascii(note)[:24],
)
def test_a_note_that_names_files_elsewhere_removes_nothing(
    note: object, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "precious").write_text("mine")
    left_by_a_save(folder, note)
    with pytest.raises(CheckpointError, match="a save was cut short here"):
        PeftModel.from_pretrained(nets.net(), folder)
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_staging_folder_that_is_a_link_is_left_alone(folder: Path, tmp_path: Path) -> None:
    place = left_by_a_save(tmp_path, {})
    (folder / ".saving-evil").symlink_to(place)
    PeftModel.from_pretrained(nets.net(), folder)
    assert sorted(p.name for p in place.iterdir()) == ["lock", "renaming.json"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes have no names here")
def test_a_lock_that_is_a_pipe_is_not_waited_for(folder: Path) -> None:
    place = left_by_a_save(folder, {})
    (place / "lock").unlink()
    os.mkfifo(place / "lock")
    PeftModel.from_pretrained(nets.net(), folder)
