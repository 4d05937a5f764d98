"""A run's state on disk, written by all ranks and read by any number of them.

    save_sharded({"model": model, "optimizer": optimizer, "step": 7}, folder)
    found = load_sharded({"model": model, "optimizer": optimizer}, folder)      # found["step"]

    folder/.metadata, *.distcp     tensors, by torch.distributed.checkpoint: each rank its parts
    folder/state.json              everything else

The new state is written aside and takes the old one's place when all of it is there, so that a kill
at any moment leaves a whole one. Of a model its adapters are saved: the base is where it came from.

PyTorch's ``.metadata`` is a pickle, which can run code when it is read: load what you saved.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from multigraft import checkpoint
from multigraft.atomic import recover, write_text
from multigraft.errors import CheckpointError, listed
from multigraft.state import roster_of_model
from multigraft.whole import fill, full_shape, is_parted, main_rank, wait_for_all

STATE = "state.json"
Pathlike = str | os.PathLike[str]


def save_sharded(state: Mapping[str, Any], folder: Pathlike) -> None:
    """Save a run's state; all ranks call, and see the same file system.

    Args:
        state: names to models with adapters, to whatever has a ``state_dict``, or to tensors,
            numbers, texts, and dictionaries and lists of them. What is no tensor is rank 0's.
        folder: replaced once everything is written.

    Raises:
        CheckpointError: there is something in it that cannot be saved, or the disk refuses.
    """
    place = Path(folder)
    tensors: dict[str, Tensor] = {}
    plain = {name: _encoded(_contents(v), name, tensors) for name, v in state.items()}
    aside = _beside(place, "new")
    if main_rank():
        _settle(place)
        shutil.rmtree(aside, ignore_errors=True)
    wait_for_all()
    try:
        save(dict(tensors), checkpoint_id=aside)
        if main_rank():
            write_text(aside / STATE, json.dumps(plain))
            _flush(aside)
            _swap(aside, place)
    except (OSError, CheckpointException) as error:
        raise CheckpointError(
            f"{place}: the state could not be saved ({error}). What was there is unchanged."
        ) from error
    wait_for_all()


def load_sharded(state: Mapping[str, Any], folder: Pathlike) -> dict[str, Any]:
    """Give models, optimisers and tensors the values of a saved state; all ranks call.

    There may be more or fewer ranks than saved it.

    Args:
        state: as for `save_sharded`; what is plain in it is ignored.

    Returns:
        Everything else that was saved, by name.

    Raises:
        CheckpointError: there is no state, or it is another run's; nothing was changed.
    """
    place = Path(folder)
    if main_rank():
        _settle(place)
    wait_for_all()
    plain, reader = _read(place)
    own: dict[str, Tensor] = {}
    targets = {}
    for name, value in state.items():
        targets[name] = _contents(value)
        _encoded(targets[name], name, own)
    own |= _of_optimisers(state, reader, own)
    stored = reader.read_metadata().state_dict_metadata
    _check(place, state, plain, own, stored)
    fresh = {name: _like(own.get(name), entry) for name, entry in stored.items()}
    load(fresh, storage_reader=reader)
    found = {name: _decoded(value, fresh) for name, value in plain.items()}
    for name, value in state.items():
        _give(value, targets[name], found[name])
    return {name: value for name, value in found.items() if not _takes(state.get(name))}


def has_sharded(folder: Pathlike) -> bool:
    """Whether a whole state lies there, or lay there when a save was cut short."""
    place = Path(folder)
    return any((path / STATE).is_file() for path in (place, _beside(place, "old")))


def _contents(value: Any) -> Any:
    """What is saved of a value: of a model its adapters, of an object its state."""
    if isinstance(value, nn.Module):
        roster, _ = roster_of_model(value)
        return {
            name: checkpoint.adapter_state(roster, name, packed=False) for name in roster.configs
        }
    return value.state_dict() if hasattr(value, "state_dict") else value


def _takes(value: Any) -> bool:
    return isinstance(value, (nn.Module, Tensor)) or hasattr(value, "load_state_dict")


def _give(value: Any, target: Any, found: Any) -> None:
    """Let a value have what was found."""
    if isinstance(value, nn.Module):
        for adapter, tensors in target.items():
            for key, tensor in tensors.items():
                _copy(tensor, found[adapter][key])
    elif isinstance(value, Tensor):
        _copy(value, found)
    elif hasattr(value, "load_state_dict"):
        value.load_state_dict(found)


@torch.no_grad()
def _copy(tensor: Any, value: Any) -> None:
    """Into a tensor, from one that lies on the ranks as it does."""
    if is_parted(tensor) and is_parted(value):
        tensor.to_local().copy_(value.to_local())
    else:
        fill(tensor, value)


def _encoded(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """What JSON can hold, tensors left out and noted by their paths."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach()
        return {"tensor": path}
    if isinstance(value, Mapping):
        pairs = [[k, _encoded(v, f"{path}/{k}", tensors)] for k, v in value.items()]
        if all(isinstance(key, (str, int)) for key, _ in pairs):
            return {"pairs": pairs}
    if isinstance(value, (list, tuple)):
        items = [_encoded(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
        return {type(value).__name__ if type(value) in (list, tuple) else "list": items}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise CheckpointError(
        f"`{path}` (={type(value).__name__}) cannot be saved: a state holds tensors, numbers, "
        "texts, None, and dictionaries and lists of them. Leave it out, or save what it is made of."
    )


def _decoded(value: Any, tensors: Mapping[str, Any]) -> Any:
    ((kind, content),) = value.items()
    return DECODERS[kind](content, tensors)


DECODERS: dict[str, Any] = {
    "tensor": lambda content, tensors: tensors[content],
    "pairs": lambda content, tensors: {k: _decoded(v, tensors) for k, v in content},
    "list": lambda content, tensors: [_decoded(v, tensors) for v in content],
    "tuple": lambda content, tensors: tuple(_decoded(v, tensors) for v in content),
    "value": lambda content, tensors: content,
}


def _read(place: Path) -> tuple[dict[str, Any], Any]:
    try:
        plain = json.loads((place / STATE).read_text("utf-8"))
        reader = FileSystemReader(place)
        reader.read_metadata()
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{place} holds no whole state of a run ({error}). Give the folder that save_sharded() "
            "was given."
        ) from error
    return plain, reader


def _of_optimisers(
    state: Mapping[str, Any], reader: Any, own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What optimisers will hold for their parameters, before their first step."""
    found = {}
    stored = reader.read_metadata().state_dict_metadata
    for name, value in state.items():
        if not isinstance(value, torch.optim.Optimizer):
            continue
        parameters = [p for group in value.param_groups for p in group["params"]]
        start = f"{name}/state/"
        for path in (p for p in stored if p.startswith(start) and p not in own):
            index = int(path.removeprefix(start).partition("/")[0])
            parameter = parameters[index] if index < len(parameters) else None
            if parameter is not None and tuple(stored[path].size) == full_shape(parameter):
                found[path] = parameter.detach()
    return found


def _check(
    place: Path,
    state: Mapping[str, Any],
    plain: Mapping[str, Any],
    own: Mapping[str, Tensor],
    stored: Mapping[str, Any],
) -> None:
    wrong = []
    absent = [name for name, value in state.items() if name not in plain and _takes(value)]
    if absent:
        wrong.append(f"it lacks {listed(absent)}")
    models = tuple(f"{n}/" for n, v in state.items() if isinstance(v, (nn.Module, Tensor)))
    missing = [name for name in own if name not in stored and name.startswith(models)]
    extra = [name for name in stored if name not in own and name.startswith(models)]
    shapes = [
        name
        for name, tensor in own.items()
        if name in stored and tuple(stored[name].size) != full_shape(tensor)
    ]
    for what, names in (
        ("it lacks the tensors", missing),
        ("the model has no", extra),
        ("of another shape are", shapes),
    ):
        if names:
            wrong.append(f"{what} {listed(names)}")
    if wrong:
        raise CheckpointError(
            f"{place} is the state of another run: {'; '.join(wrong)}. Nothing was changed. Attach "
            "the adapters that it had, under the same names, before loading it."
        )


def _like(own: Tensor | None, entry: Any) -> Tensor:
    """An empty tensor for a stored one, lying on the ranks as one's own does."""
    if own is not None:
        return torch.empty_like(own, dtype=entry.properties.dtype)
    return torch.empty(entry.size, dtype=entry.properties.dtype)


def _beside(place: Path, what: str) -> Path:
    return place.with_name(f".{place.name}.{what}")


def _swap(aside: Path, place: Path) -> None:
    """Put the new folder where the old one is; `_settle` undoes half of it."""
    old = _beside(place, "old")
    if place.exists():
        os.rename(place, old)
    os.rename(aside, place)
    shutil.rmtree(old, ignore_errors=True)


def _settle(place: Path) -> None:
    """After a kill between two renames, put the old folder back."""
    old = _beside(place, "old")
    if not old.exists():
        return
    if place.exists():
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(old, place)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _flush(folder: Path) -> None:
    recover(folder)
    for path in _files(folder):
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
