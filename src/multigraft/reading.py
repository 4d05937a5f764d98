"""Reading adapter files that anybody may have made: what they claim is checked before it is used.

- Nothing of a file is run: no pickle, unless asked for.
- Whatever is refused is refused by an error of ours: what was found, what is required, what to do.
- Time and memory are bounded by the limits below, and not by what a file claims.
- Tensors are mapped from the file, so nothing of one is read before it is used.

A safetensors file is 8 bytes that give the header's length, the header (JSON: names to dtype, shape
and place), and the tensors' bytes, each behind the one before.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from multigraft.errors import CheckpointError, ConfigError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
LFS_POINTER = b"version https://git-lfs"

CONFIG_BYTES = 2 << 20
"""Twenty thousand full paths of modules fit."""
CONFIG_DEPTH = 32
HEADER_BYTES = 32 << 20
TENSORS = 300_000
"""A pair for each of the 384 experts' three matrices in 61 layers are 140,544."""
DIMENSIONS = 16
NAME_LENGTH = 512
LARGEST = 1 << 59
"""Numbers in one tensor; torch counts their bytes in 63 bits."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
"""What tensors of an adapter may be, by the names of the format."""


class TensorInfo(NamedTuple):
    """What a header says of one tensor; ``start`` and ``end`` are bytes of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file holds, checked against its size; no tensor was read.

    Args:
        tensors: by name, in the order of their bytes.
        metadata: what its writer noted.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


class _Wrong(Exception):
    """What is wrong inside a file; the boundary adds where, and the remedy."""


def read_config(path: Path) -> dict[str, Any]:
    """The values of an ``adapter_config.json``, as they stand there.

    Raises:
        ConfigError: it is no JSON object, or larger or deeper than any config.
        CheckpointError: it cannot be read.
    """
    try:
        with _open(path) as file:
            data = file.read(CONFIG_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}).") from error
    if len(data) > CONFIG_BYTES:
        raise ConfigError(
            f"{path} has more than {CONFIG_BYTES:,} bytes, which no adapter's config needs. Is it "
            "another file? Copy or download the config again."
        )
    try:
        values = json.loads(data.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError, _Wrong) as error:
        raise ConfigError(f"{path}: not valid JSON ({error}).") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a JSON object, not {type(values).__name__}.")
    _check_depth(path, values)
    return values


def read_header(path: Path) -> Header:
    """What a safetensors file holds, without its tensors.

    Raises:
        CheckpointError: it is none, its header contradicts its size or itself, or a name or a
            shape is none that a tensor could have.
    """
    try:
        with _open(path) as file:
            text, rest, begin = _header_bytes(file)
        return _checked(_parsed(text), rest, begin)
    except (_Wrong, OSError) as error:
        _refuse_weights(path, error)


def read_tensors(path: Path, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its name there, on the CPU; see the module on memory.

    Raises:
        CheckpointError: the file is damaged, or is a pickle and ``allow_pickle`` is not set.
    """
    if path.suffix in PICKLE_ENDINGS:
        return _unpickled(path, allow_pickle)
    header = read_header(path)
    try:
        tensors = load_file(path, device="cpu")
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
        _refuse_weights(path, error)
    return {name: tensors[name] for name in header.tensors}


def check_inside(path: Path, folder: Path) -> None:
    """Fail when symbolic links, or ``..``, lead from a folder's file to another place.

    The hub's cache keeps files in ``blobs``, of the repository or of all of them, and links to them
    from ``snapshots``: those may.

    Raises:
        CheckpointError: the file lies elsewhere.
    """
    real, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if root in real.parents:
        return
    repository = next((p.parent for p in root.parents if p.name == "snapshots"), None)
    if repository is not None:
        own, shared = repository / "blobs", repository.parent / "blobs"
        if real.parent == own or real.parent.parent == shared:
            return
    raise CheckpointError(
        f"{path} leads out of {folder}, to {real}. Files of an adapter must lie in its folder: "
        "copy the file itself there (cp -L), or name the folder where it lies."
    )


def shown(name: str, limit: int = 80) -> str:
    """A name from a file as a message may hold it: short, and nothing that a terminal acts on."""
    text = name if name.isprintable() else ascii(name)[1:-1]
    return f"`{text[:limit]}…`" if len(text) > limit else f"`{text}`"


def _open(path: Path) -> IO[bytes]:
    """A regular file; anything else could be read for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{path.name} is no regular file")
    return open(path, "rb")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, unless a key is in it twice: which one counts would be chance."""
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _Wrong(f"the key {shown(twice)} stands there twice")
    return values


def _check_depth(path: Path, values: dict[str, Any]) -> None:
    level: list[Any] = [values]
    for _ in range(CONFIG_DEPTH):
        level = [inner for value in level for inner in _inside(value)]
    if level:
        raise ConfigError(
            f"{path} is nested more than {CONFIG_DEPTH} levels deep, which no adapter's config is. "
            "Copy or download it again."
        )


def _inside(value: Any) -> list[Any]:
    """The containers in a container of JSON; and strings that no message could print."""
    if isinstance(value, dict):
        for key in value:
            _check_text(key)
        value = list(value.values())
    for item in value:
        if isinstance(item, str):
            _check_text(item)
    return [item for item in value if isinstance(item, (dict, list))]


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(
            f"{CONFIG_NAME} holds half a character (a lone surrogate) in {shown(text)}. Copy or "
            "download it again."
        ) from None


def _header_bytes(file: IO[bytes]) -> tuple[bytes, int, int]:
    """The header, how many bytes follow it, and where they begin."""
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise _Wrong(f"it has {size} bytes, fewer than the 8 that give the header's length")
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        raise _Wrong(f"it claims a header of {length:,} bytes, in a file of {size:,}")
    if length > HEADER_BYTES:
        raise _Wrong(f"its header has {length:,} bytes; at most {HEADER_BYTES:,} are read")
    return file.read(length), size - 8 - length, 8 + length


def _parsed(text: bytes) -> dict[str, Any]:
    # An object or a list takes many times the memory of its brackets.
    if text.count(b"{") + text.count(b"[") > 3 * TENSORS + 2:
        raise _Wrong(f"its header describes more than {TENSORS:,} tensors")
    try:
        values = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise _Wrong(f"its header is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise _Wrong("its header is no JSON object")
    return values


def _checked(values: dict[str, Any], rest: int, begin: int) -> Header:
    metadata = values.pop("__metadata__", None) or {}
    if not _is_text(metadata):
        raise _Wrong("`__metadata__` of its header must map text to text")
    found = [(name, *_entry(name, entry)) for name, entry in values.items()]
    found.sort(key=lambda each: each[3])
    tensors: dict[str, TensorInfo] = {}
    place = 0
    for name, dtype, shape, (start, end) in found:
        if start != place:
            what = "begins inside" if start < place else "leaves a gap behind"
            raise _Wrong(
                f"the tensor {shown(name)} (bytes {start:,} to {end:,}) {what} the one before it, "
                f"which ends at {place:,}"
            )
        tensors[name] = TensorInfo(dtype, shape, begin + start, begin + end)
        place = end
    if place != rest:
        raise _Wrong(f"its header describes {place:,} bytes of tensors, and {rest:,} are there")
    return Header(tensors, metadata)


def _entry(name: str, entry: Any) -> tuple[torch.dtype, tuple[int, ...], tuple[int, int]]:
    """Dtype, shape and place of one tensor, each of them checked by itself and by the others."""
    _check_tensor_name(name)
    if not isinstance(entry, dict):
        raise _Wrong(f"the tensor {shown(name)} is not described by an object")
    kind: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    place: Any = entry.get("data_offsets")
    dtype = DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise _Wrong(
            f"the tensor {shown(name)} has the dtype {shown(str(kind))}; read are "
            f"{', '.join(DTYPES)}"
        )
    if not _are_sizes(shape) or len(shape) > DIMENSIONS:
        raise _Wrong(
            f"the tensor {shown(name)} has the shape {shown(str(shape))}; required are at most "
            f"{DIMENSIONS} sizes from 0"
        )
    if not _are_sizes(place) or len(place) != 2:
        raise _Wrong(f"the tensor {shown(name)} has no two `data_offsets`: {shown(str(place))}")
    if math.prod(size or 1 for size in shape) >= LARGEST:
        raise _Wrong(f"the tensor {shown(name)} has the absurd shape {shown(str(shape))}")
    count = math.prod(shape) * dtype.itemsize
    start, end = place
    if end - start != count:
        raise _Wrong(
            f"the tensor {shown(name)} of shape {list(shape)} takes {count:,} bytes as {kind}, and "
            f"has those from {start:,} to {end:,}"
        )
    return dtype, tuple(shape), (start, end)


def _check_tensor_name(name: str) -> None:
    """Names are paths of modules: none of them could be a path of files, or goes to a terminal."""
    if not name or len(name) > NAME_LENGTH or not name.isprintable():
        raise _Wrong(
            f"{shown(name)} is no tensor's name; required are 1 to {NAME_LENGTH} printable "
            "characters"
        )
    if "/" not in name and "\\" not in name:
        return
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or (len(parts) > 1 and (not parts[0] or parts[0].endswith(":"))):
        raise _Wrong(f"the tensor {shown(name)} is named like a path to another folder")


def _is_text(metadata: Any) -> bool:
    if not isinstance(metadata, Mapping):
        return False
    return all(isinstance(text, str) for pair in metadata.items() for text in pair)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _refuse_weights(path: Path, error: Exception) -> NoReturn:
    raise CheckpointError(
        f"{path} is damaged or no safetensors file ({error}).{_remedy(path)}"
    ) from error


def _remedy(path: Path) -> str:
    try:
        with _open(path) as file:
            is_pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return " Check that it can be read."
    if is_pointer:
        return " It is a pointer of Git LFS: fetch what it stands for with `git lfs pull`."
    return " Copy or download it again."


def _unpickled(path: Path, is_allowed: bool) -> dict[str, Tensor]:
    if not is_allowed:
        raise CheckpointError(
            f"{path} is a pickle, which can run code when it is read. Convert it to "
            "safetensors, or pass allow_pickle=True if you trust where it comes from."
        )
    try:
        with _open(path) as file:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle raises whatever the damaged bytes happen to mean
        raise CheckpointError(f"{path} is damaged or holds more than tensors ({error}).") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in tensors.items()
    ):
        raise CheckpointError(f"{path} holds no dictionary of names to tensors.")
    return tensors
