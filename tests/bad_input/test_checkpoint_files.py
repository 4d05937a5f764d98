"""Files that are damaged, absent, or pickles: refused and named, and nothing changes."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from multigraft import (
    CheckpointError,
    ConfigError,
    PeftConfig,
    PeftModel,
    get_peft_model,
    reading,
)
from tests.bad_input.loading import CONFIG, PREFIX, SETTINGS, WEIGHTS, refused, ways
from tests.weaknesses import nets

# Bytes that are no checkpoint.

BYTES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "one byte": lambda data: data[:1],
    "half a header": lambda data: data[:100],
    "half the tensors": lambda data: data[: len(data) - len(data) // 3],
    "a byte too few": lambda data: data[:-1],
    "a byte too many": lambda data: data + b"\0",
    "a broken header": lambda data: data[:8] + b"[" + data[9:],
    "a header without end": lambda data: b"\xff" * 8 + data[8:],
    "zeros": lambda data: bytes(len(data)),
    "text": lambda data: b"not found",
    "a pickle": lambda data: pickle.dumps({"a": 1}),
}


@ways
@pytest.mark.parametrize("which", BYTES)
def test_weights_that_are_no_safetensors_are_refused_and_named(
    which: str, way: Callable[..., Any], folder: Path
) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(BYTES[which](data))
    message = refused(CheckpointError, *way(folder), folder)
    assert f"{folder / WEIGHTS} is damaged or no safetensors file" in message
    assert "Copy or download it again" in message


@ways
def test_a_pointer_of_git_lfs_is_recognised(way: Callable[..., Any], folder: Path) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    message = refused(CheckpointError, *way(folder), folder)
    assert "pointer of Git LFS" in message
    assert "git lfs pull" in message


@pytest.mark.parametrize("name", [WEIGHTS, SETTINGS])
def test_a_file_that_cannot_be_read_is_refused_and_named(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = reading._open

    def deny(path: Path) -> object:
        if path.name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return allowed(path)

    monkeypatch.setattr(reading, "_open", deny)
    with pytest.raises(CheckpointError, match=f"{name}.*Permission denied"):
        PeftModel.from_pretrained(nets.net(), folder)


def test_a_config_nested_beyond_reason_is_refused(folder: Path) -> None:
    (folder / SETTINGS).write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="not valid JSON"):
        PeftConfig.from_pretrained(folder)


# Files that are not there.

ABSENT: dict[str, tuple[tuple[str, ...], str]] = {
    "no weights": ((WEIGHTS,), f"holds no {WEIGHTS}"),
    "no config": ((SETTINGS,), f"holds no {SETTINGS}"),
    "an empty directory": ((WEIGHTS, SETTINGS), f"holds no {SETTINGS}"),
}


@ways
@pytest.mark.parametrize("which", ABSENT)
def test_a_directory_that_lacks_a_file_is_refused_and_named(
    which: str, way: Callable[..., Any], folder: Path
) -> None:
    names, words = ABSENT[which]
    for name in names:
        (folder / name).unlink()
    message = refused(CheckpointError, *way(folder), folder)
    assert f"{folder} {words}" in message


def test_a_directory_that_does_not_exist_is_refused_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere holds no.*There is no such directory"):
        PeftModel.from_pretrained(nets.net(), tmp_path / "nowhere")


def test_a_file_in_place_of_a_directory_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        PeftModel.from_pretrained(nets.net(), folder / WEIGHTS)


def test_a_directory_of_several_adapters_names_them(tmp_path: Path) -> None:
    model = get_peft_model(nets.net(), CONFIG, adapter_name="german")
    model.add_adapter("french", CONFIG)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"subfolders: french, german \(pass subfolder=\)"):
        PeftModel.from_pretrained(nets.net(), tmp_path)
    loaded = PeftModel.from_pretrained(nets.net(), tmp_path, subfolder="german")
    assert loaded.active_adapters == ["default"]
    loaded.load_adapter(tmp_path, "french")
    with pytest.raises(CheckpointError, match=r"holds no adapter_config\.json"):
        PeftModel.from_pretrained(nets.net(), tmp_path, subfolder="spanish")


def test_a_name_of_the_hub_that_is_not_at_hand_says_where_it_was_sought() -> None:
    with pytest.raises(CheckpointError, match=r"`no/such-adapter`: .* is not in the cache"):
        PeftModel.from_pretrained(nets.net(), "no/such-adapter", local_files_only=True)


# Pickles.


class Trap:
    """Unpickling it makes a directory."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (self.path,)


def as_pickle(folder: Path, content: object) -> None:
    """Put a pickle where the safetensors file was."""
    (folder / WEIGHTS).unlink()
    torch.save(content, folder / "adapter_model.bin")


@ways
def test_a_pickle_is_refused_unread_with_the_ways_out(
    way: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    as_pickle(folder, {"a": Trap(str(tmp_path / "sprung"))})
    message = refused(CheckpointError, *way(folder), folder)
    assert "adapter_model.bin is a pickle, which can run code when it is read" in message
    assert "safetensors" in message
    assert "allow_pickle=True" in message
    assert not (tmp_path / "sprung").exists()


@ways
def test_a_pickle_of_more_than_tensors_runs_nothing_even_when_allowed(
    way: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    as_pickle(folder, {"a": Trap(str(tmp_path / "sprung"))})
    message = refused(CheckpointError, *way(folder, allow_pickle=True), folder)
    assert "is damaged or holds more than tensors" in message
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [[torch.ones(2)], {"a": "text"}, torch.ones(3)], ids=repr)
def test_a_pickle_of_something_else_is_refused(content: object, folder: Path) -> None:
    as_pickle(folder, content)
    with pytest.raises(CheckpointError, match="holds no dictionary of names to tensors"):
        PeftModel.from_pretrained(nets.net(), folder, allow_pickle=True)


def test_a_pickle_of_tensors_is_read_when_allowed(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    as_pickle(folder, tensors)
    model = PeftModel.from_pretrained(nets.net(), folder, allow_pickle=True)
    up = nets.layer(model, "blocks.1.up").lora_B["default"].weight
    assert torch.equal(up, tensors[f"{PREFIX}blocks.1.up.lora_B.weight"])


def test_a_safetensors_file_wins_over_a_pickle_beside_it(folder: Path, tmp_path: Path) -> None:
    torch.save({"a": Trap(str(tmp_path / "sprung"))}, folder / "adapter_model.bin")
    PeftModel.from_pretrained(nets.net(), folder)
    assert not (tmp_path / "sprung").exists()
