"""A base model whose weights stay in their files: every module is there, and takes no memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from multigraft.errors import CheckpointError, MissingExtraError, UnsupportedError, listed
from multigraft.inspection import AdapterFiles
from multigraft.merging.layout import REMEDY, Built, layout_of
from multigraft.merging.mapped import MappedWeights
from multigraft.train import load_skeleton
from multigraft.vocabulary import embeddings_of, fit_vocabulary

CONFIG = "config.json"
FETCHED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*")


@dataclass(eq=False)
class MappedModel:
    """A model over mapped weights.

    Args:
        folder: where it lies.
        model: its modules; parameters and persistent buffers are the files' bytes.
        weights: the files.
        names: every path of a tensor in the model to its key in the files; of tied ones to the key
            of the one that is stored.
        stored: those of these paths that have a key of their own.
        built: paths of what is made of several tensors of the files; the model has zeros there,
            which take no memory, until `values_of` is put in.
        places: every path to the module that holds the tensor, and its name there.
        resized: paths of embeddings that have another size than in the files, and are in memory.
    """

    folder: Path
    model: nn.Module
    weights: MappedWeights
    names: dict[str, str] = field(default_factory=dict)
    stored: frozenset[str] = frozenset()
    built: dict[str, Built] = field(default_factory=dict)
    places: dict[str, tuple[nn.Module, str]] = field(default_factory=dict)
    resized: list[str] = field(default_factory=list)

    @property
    def config(self) -> dict[str, Any]:
        """Its ``config.json``."""
        return read_json(self.folder / CONFIG)

    def fit(self, adapters: Iterable[AdapterFiles]) -> None:
        """Give the embeddings room for the vocabulary of these adapters, before any is attached."""
        if fit_vocabulary(self.model, adapters) is None:
            return
        for path, module in embeddings_of(self.model).items():
            self.resized.append(f"{path}.weight")
            self.places[f"{path}.weight"] = module, "weight"

    def values_of(self, path: str) -> Tensor:
        """What stands at this path, made of the files' tensors where it is `built`."""
        if path not in self.built:
            value: Tensor = held(*self.places[path])
            return value
        made = self.built[path].make(self.weights)[path]
        self.weights.forget()
        return made.contiguous()

    @cached_property
    def paths_at(self) -> dict[tuple[int, str], list[str]]:
        """Every path to a tensor, by the identity of who holds it and its name there."""
        found: dict[tuple[int, str], list[str]] = {}
        for path, (owner, leaf) in self.places.items():
            found.setdefault((id(owner), leaf), []).append(path)
        return found

    @cached_property
    def paths_of(self) -> dict[int, list[str]]:
        """Every path to a tensor by its identity; tied ones are one."""
        found: dict[int, list[str]] = {}
        for path, place in self.places.items():
            found.setdefault(id(held(*place)), []).append(path)
        return found


def local_folder(source: str | os.PathLike[str]) -> Path:
    """Where a model lies, fetched from the hub when it is no directory.

    Raises:
        CheckpointError: there is none.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    name = os.fspath(source)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CheckpointError(f"{name}: there is no such directory to read a base model from.")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingExtraError(
            f"`{name}` is no local directory, and fetching it from the hub needs huggingface_hub: "
            "pip install 'multigraft[train]'."
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=list(FETCHED)))
    except Exception as error:  # the hub's errors have no one root
        raise CheckpointError(
            f"`{name}` is no local directory, and the hub does not give it "
            f"({str(error).strip().splitlines()[0]})."
        ) from error


def open_base(folder: Path) -> MappedModel:
    """The model in a folder, with its weights where they are.

    Raises:
        CheckpointError: there is none, it is damaged, or it lacks weights.
        UnsupportedError: it is quantised, or stored in another layout than the model's.
    """
    _refuse_quantised(folder)
    model = load_skeleton(folder, with_buffers=True)
    weights = MappedWeights(folder)
    found = MappedModel(folder, model, weights)
    _put_in(found)
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: it is none.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}).") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(values).__name__}.")
    return values


def _refuse_quantised(folder: Path) -> None:
    if not (folder / CONFIG).is_file():
        return  # the skeleton says so better
    found = read_json(folder / CONFIG).get("quantization_config")
    if found:
        kind = found.get("quant_method", "quantised") if isinstance(found, dict) else "quantised"
        raise UnsupportedError(
            f"{folder}: its weights are quantised ({kind}), and merging would round them a second "
            "time. Give the model that it was quantised from with --base: the adapter fits it. Or "
            "keep the adapter as it is, and load it beside the quantised base."
        )


def _put_in(found: MappedModel) -> None:
    """Give every parameter and persistent buffer its mapped tensor; tied ones share one."""
    weights, places = found.weights, _places(found.model)
    layout = layout_of(found.model, {n: tensor for n, (_, _, tensor) in places.items()}, weights)
    found.built, keys = layout.built, layout.names
    found.stored = frozenset(keys)
    twins: dict[int, list[str]] = {}
    for name in sorted(places, key=lambda name: name not in keys):  # what is stored comes first
        owner, leaf, tensor = places[name]
        same = twins.setdefault(id(tensor), [])
        if name in keys:
            _check_shape(found.folder, keys[name], weights, tensor)
            twin = _twin(found, same, weights[keys[name]])
            _place(owner, leaf, weights[keys[name]], twin)
        elif name in found.built:
            info = weights.info(found.built[name].keys[0])
            _check_built(found, name, tensor)
            _place(owner, leaf, torch.zeros(1, dtype=info.dtype).expand(tensor.shape), None)
        elif same:
            owner._parameters[leaf] = held(*found.places[same[0]])
            keys[name] = keys[same[0]]
        else:
            continue
        found.places[name] = owner, leaf
        same.append(name)
    weights.forget()
    found.names = keys
    missing = [n for n, (_, _, t) in places.items() if n not in found.places and t.is_meta]
    if missing:
        raise UnsupportedError(
            f"{found.folder}: its files do not hold {listed(missing, 3)}: they are incomplete, or "
            f"stored in another layout than transformers' model has them. {REMEDY}"
        )


def held(owner: nn.Module, leaf: str) -> Any:
    """The parameter or buffer of this name."""
    return owner._parameters[leaf] if leaf in owner._parameters else owner._buffers[leaf]


def _twin(found: MappedModel, same: list[str], value: Tensor) -> nn.Parameter | None:
    """The parameter that a value is tied to, where the files hold both and they are the same."""
    for other in same:
        parameter: nn.Parameter = held(*found.places[other])
        if torch.equal(parameter, value):
            return parameter
    return None


def _place(owner: nn.Module, leaf: str, value: Tensor, twin: nn.Parameter | None) -> None:
    if leaf in owner._parameters:
        owner._parameters[leaf] = twin or nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value


def _places(model: nn.Module) -> dict[str, tuple[nn.Module, str, Tensor]]:
    """Every parameter and persistent buffer by every path that leads to it."""
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        tables = [module._parameters, module._buffers]
        for table in tables:
            for leaf, tensor in table.items():
                if tensor is not None and leaf not in module._non_persistent_buffers_set:
                    found[f"{path}.{leaf}" if path else leaf] = (module, leaf, tensor)
    return found


def _check_built(found: MappedModel, path: str, tensor: Tensor) -> None:
    shape = found.built[path].shapes[path]
    if shape != tuple(tensor.shape):
        raise CheckpointError(
            f"{found.folder}: `{path}` is {shape} by the files, and {tuple(tensor.shape)} by its "
            "config. Copy or download the model again."
        )


def _check_shape(folder: Path, key: str, weights: MappedWeights, tensor: Tensor) -> None:
    shape = weights.info(key).shape
    if shape != tuple(tensor.shape):
        raise CheckpointError(
            f"{folder}: `{key}` is {shape} in the files, and {tuple(tensor.shape)} by its config. "
            "Copy or download the model again."
        )
