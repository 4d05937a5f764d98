"""The reader of adapter files: what it gives, and what it refuses whatever a file claims."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from multigraft import CheckpointError, ConfigError, reading
from multigraft.reading import check_inside, read_config, read_header, read_tensors, shown

GOOD = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(2, dtype=torch.bfloat16)}


def entry(shape: Any, place: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": place}


def write(folder: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A file with this header (JSON, or bytes as they are), and what follows it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path = folder / "adapter_model.safetensors"
    path.write_bytes(size.to_bytes(8, "little") + text + data)
    return path


def refused(path: Path) -> str:
    """The one message with which the header and the tensors of this file are refused."""
    messages = []
    for read in (read_header, read_tensors):
        with pytest.raises(CheckpointError) as caught:
            read(path)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert f"{path} is damaged or no safetensors file" in messages[0]
    return messages[0]


def resident() -> int:
    """Bytes of memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


# What a good file gives.


def test_a_header_tells_names_dtypes_shapes_places_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(GOOD, path, {"format": "pt"})
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert set(header.tensors) == {"a", "b"}
    info = header.tensors["b"]
    assert (info.dtype, info.shape) == (torch.float32, (2, 3))
    assert path.read_bytes()[info.start : info.end] == GOOD["b"].numpy().tobytes()


def test_tensors_are_read_by_their_names_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(GOOD, path)
    tensors = read_tensors(path)
    assert tensors.keys() == GOOD.keys()
    assert all(torch.equal(tensors[k], GOOD[k]) for k in GOOD)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's figures")
def test_a_large_file_costs_no_memory_until_a_tensor_is_used(tmp_path: Path) -> None:
    path = write(tmp_path, {"a": entry([1 << 28], [0, 1 << 30])})
    os.truncate(path, path.stat().st_size + (1 << 30))  # a gigabyte, of which nothing is written
    before = resident()
    assert read_tensors(path)["a"].shape == (1 << 28,)
    assert resident() - before < 100 << 20


# Headers that lie.

FOUR = b"\0" * 4
LIES: dict[str, tuple[object, bytes, str]] = {
    "beyond the file": ({"a": entry([3], [0, 12])}, FOUR, "describes 12 bytes of tensors, and 4"),
    "less than the file": ({"a": entry([1], [0, 4])}, FOUR * 2, "describes 4 bytes of tensors"),
    "overlapping": (
        {"a": entry([2], [0, 8]), "b": entry([1], [4, 8])},
        FOUR * 2,
        "`b` (bytes 4 to 8) begins inside the one before it, which ends at 8",
    ),
    "twice the same": (
        {"a": entry([1], [0, 4]), "b": entry([1], [0, 4])},
        FOUR,
        "`b` (bytes 0 to 4) begins inside",
    ),
    "a gap": (
        {"a": entry([1], [0, 4]), "b": entry([1], [8, 12])},
        FOUR * 3,
        "`b` (bytes 8 to 12) leaves a gap behind the one before it",
    ),
    "backwards": ({"a": entry([1], [4, 0])}, FOUR, "has those from 4 to 0"),
    "negative place": ({"a": entry([1], [-4, 0])}, FOUR, "has no two `data_offsets`"),
    "one place": ({"a": entry([1], [0])}, FOUR, "has no two `data_offsets`: `[0]`"),
    "places of floats": ({"a": entry([1], [0, 4.0])}, FOUR, "has no two `data_offsets`"),
    "another size": (
        {"a": entry([2], [0, 4])},
        FOUR,
        "shape [2] takes 8 bytes as F32, and has those from 0 to 4",
    ),
    "absurd shape": ({"a": entry([1 << 40, 1 << 40], [0, 4])}, FOUR, "absurd shape `[10995"),
    "absurd and empty": ({"a": entry([0, 1 << 62], [0, 0])}, b"", "absurd shape `[0, 46"),
    "negative size": ({"a": entry([-1], [0, 4])}, FOUR, "required are at most 16 sizes from 0"),
    "a size of text": ({"a": entry(["1"], [0, 4])}, FOUR, "required are at most 16 sizes"),
    "a size that is true": ({"a": entry([True], [0, 4])}, FOUR, "required are at most 16"),
    "many sizes": ({"a": entry([1] * 17, [0, 4])}, FOUR, "required are at most 16 sizes"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, FOUR, "has the shape `None`"),
    "unknown dtype": ({"a": entry([1], [0, 4], "F128")}, FOUR, "dtype `F128`; read are F64, F32"),
    "a dtype of lists": ({"a": entry([1], [0, 4], [])}, FOUR, "has the dtype `[]`"),
    "no object": ({"a": 3}, FOUR, "`a` is not described by an object"),
    "a list": ([], b"", "its header is no JSON object"),
    "a name twice": (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        FOUR,
        "the key `a` stands there twice",
    ),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", "`__metadata__` of its header must"),
    "nested without end": (b"[" * 50_000, b"", "its header is no JSON"),
    "half a character": (b'{"\\ud800": 1}', b"", "is no tensor's name"),
    "no text": (b"\xff\xfe", b"", "its header is no JSON"),
}


@pytest.mark.parametrize("which", LIES)
def test_a_header_that_lies_is_refused_with_what_it_says(which: str, tmp_path: Path) -> None:
    header, data, words = LIES[which]
    assert words in refused(write(tmp_path, header, data))


@pytest.mark.parametrize(
    ("length", "words"),
    [
        (1 << 63, "claims a header of 9,223,372,036,854,775,808 bytes, in a file of"),
        (1000, "claims a header of 1,000 bytes, in a file of 10"),
    ],
)
def test_a_header_longer_than_the_file_is_refused(length: int, words: str, tmp_path: Path) -> None:
    assert words in refused(write(tmp_path, {}, length=length))


def test_a_header_of_absurd_size_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path, b"", length=1 << 40)
    os.truncate(path, 1 << 41)
    assert "its header has 1,099,511,627,776 bytes; at most" in refused(path)


@pytest.mark.parametrize("bomb", [b"[],", b"{},", b'"a":{},'], ids=str)
def test_a_header_of_too_many_objects_is_refused_before_they_are_made(
    bomb: bytes, tmp_path: Path
) -> None:
    path = write(tmp_path, b"[" + bomb * 2_000_000 + b"0]")
    start = time.perf_counter()
    assert "describes more than 300,000 tensors" in refused(path)
    assert time.perf_counter() - start < 5


def test_a_name_twice_among_very_many_is_found_in_time(tmp_path: Path) -> None:
    names = [f'"{number}":0' for number in range(200_000)]
    path = write(tmp_path, f"{{{','.join([*names, names[-1]])}}}".encode())
    start = time.perf_counter()
    assert "the key `199999` stands there twice" in refused(path)
    assert time.perf_counter() - start < 5


# Names.


@pytest.mark.parametrize(
    "name", ["../../x", "a/../b", "/etc/passwd", "C:/x", "..\\x", "\\\\host\\x", "a\\.."]
)
def test_a_name_like_a_path_to_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, {name: entry([1], [0, 4])}, FOUR)
    assert "is named like a path to another folder" in refused(path)


@pytest.mark.parametrize("name", ["", "a\0b", "\x1b[2Ja", "a\nb", "x" * 1025], ids=ascii)
def test_a_name_that_is_none_is_refused_and_not_sent_to_the_terminal(
    name: str, tmp_path: Path
) -> None:
    message = refused(write(tmp_path, {name: entry([1], [0, 4])}, FOUR))
    assert "is no tensor's name; required are 1 to 512 printable characters" in message
    assert message.isprintable()
    assert len(message) < 500


def test_a_slash_inside_a_modules_name_is_no_path(tmp_path: Path) -> None:
    path = write(tmp_path, {"heads.a/b.weight": entry([1], [0, 4])}, FOUR)
    assert list(read_header(path).tensors) == ["heads.a/b.weight"]


def test_a_shown_name_is_short_and_printable() -> None:
    assert shown("a.b") == "`a.b`"
    assert shown("\x1b[2J") == "`\\x1b[2J`"
    assert len(shown("x" * 1000)) < 100


# Configs.


def config(folder: Path, text: str | bytes) -> Path:
    path = folder / "adapter_config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_configs_values_are_given_as_they_stand_there(tmp_path: Path) -> None:
    assert read_config(config(tmp_path, '{"r": 8, "a": [1, {"b": null}]}')) == {
        "r": 8,
        "a": [1, {"b": None}],
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not valid JSON"),
        ('{"r": 8', "not valid JSON"),
        (b"\xff", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"r": ' + "9" * 10_000 + "}", "not valid JSON"),
        ('{"r": 8, "r": 16}', "the key `r` stands there twice"),
        ('{"a": {"r": 8, "r": 16}}', "the key `r` stands there twice"),
        ("[1]", "must hold a JSON object, not list"),
        ("3", "must hold a JSON object, not int"),
        ('{"a": ' + "[" * 33 + "]" * 33 + "}", "nested more than 32 levels deep"),
        ('{"a": ' * 40 + "1" + "}" * 40, "nested more than 32 levels deep"),
        ('{"a": "\\ud800"}', "half a character"),
        ('{"a": {"\\ud800": 1}}', "half a character"),
    ],
    ids=lambda value: ascii(value)[:24],
)
def test_a_config_that_is_none_is_refused(text: str | bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(config(tmp_path, text))
    assert words in str(caught.value)


def test_a_config_of_megabytes_is_refused_unread(tmp_path: Path) -> None:
    path = config(tmp_path, "[")
    os.truncate(path, 1 << 40)
    with pytest.raises(ConfigError, match="has more than 2,097,152 bytes, which no adapter's"):
        read_config(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes have no names here")
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="is no regular file"):
        read_config(path)
    assert "is no regular file" in refused(path)


# Pickles.


@pytest.mark.parametrize("ending", reading.PICKLE_ENDINGS)
def test_a_pickle_of_any_ending_is_refused_unless_allowed(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{ending}"
    torch.save({"a": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="is a pickle, which can run code"):
        read_tensors(path)
    assert torch.equal(read_tensors(path, allow_pickle=True)["a"], torch.ones(2))


def test_a_pickle_of_tensors_without_names_is_refused(tmp_path: Path) -> None:
    torch.save({1: torch.ones(2)}, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match="holds no dictionary of names to tensors"):
        read_tensors(tmp_path / "x.bin", allow_pickle=True)


# Links.


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    path = tmp_path / "outside"
    path.mkdir()
    (path / "file").touch()
    return path


def linked(folder: Path, target: Path, name: str = "file") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).symlink_to(target)
    return folder / name


def test_a_link_out_of_the_folder_is_refused_with_the_remedy(tmp_path: Path, outside: Path) -> None:
    path = linked(tmp_path / "adapter", outside / "file")
    with pytest.raises(CheckpointError, match=r"leads out of .*adapter, to .*outside.*cp -L"):
        check_inside(path, path.parent)


def test_a_linked_subfolder_is_refused(tmp_path: Path, outside: Path) -> None:
    linked(tmp_path / "adapter", outside, "sub")
    with pytest.raises(CheckpointError, match="leads out of"):
        check_inside(tmp_path / "adapter" / "sub" / "file", tmp_path / "adapter")


def test_a_folder_that_is_a_link_itself_is_the_users_own_choice(
    tmp_path: Path, outside: Path
) -> None:
    link = linked(tmp_path / "links", outside, "adapter")
    check_inside(link / "file", link)


def test_a_link_within_the_folder_is_well(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    (folder / "real").mkdir(parents=True)
    (folder / "real" / "file").touch()
    check_inside(linked(folder, Path("real/file")), folder)


def test_links_of_a_hubs_cache_are_well(tmp_path: Path) -> None:
    repository = tmp_path / "models--some--adapter"
    (repository / "blobs").mkdir(parents=True)
    (repository / "blobs" / "ab12").touch()
    snapshot = repository / "snapshots" / "main"
    check_inside(linked(snapshot, Path("../../blobs/ab12")), snapshot)
    check_inside(linked(snapshot / "sub", Path("../../../blobs/ab12")), snapshot)


def test_blobs_that_are_a_link_to_elsewhere_are_no_cache(tmp_path: Path, outside: Path) -> None:
    repository = tmp_path / "models--some--adapter"
    linked(repository, outside, "blobs")
    snapshot = repository / "snapshots" / "main"
    path = linked(snapshot, Path("../../blobs/file"))
    with pytest.raises(CheckpointError, match="leads out of"):
        check_inside(path, snapshot)
