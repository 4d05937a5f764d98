"""The tensors of a fine-tuned model, wherever they are: each is read when it is asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from multigraft.errors import CheckpointError, UnsupportedError
from multigraft.layer import AdaptedLayer
from multigraft.storage import storage_of


class Tuned:
    """Tensors by name.

    Args:
        source: a model, a mapping, or a file or directory of safetensors.

    Raises:
        UnsupportedError: the model has adapters.
        CheckpointError: there is no such file.
    """

    def __init__(self, source: nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]) -> None:
        self.model = source if isinstance(source, nn.Module) else None
        if self.model and any(isinstance(m, AdaptedLayer) for m in self.model.modules()):
            raise UnsupportedError(
                "`tuned` has adapters, which are no part of its weights. Give what its "
                "merge_and_unload() returns."
            )
        self.files: dict[str, Path] = {}
        self.tensors: Mapping[str, Tensor] = {}
        if isinstance(source, (str, os.PathLike)):
            self.files = _files(Path(source))
        elif isinstance(source, Mapping):
            self.tensors = source

    def get(self, name: str, shape: torch.Size) -> Tensor:
        """The tensor, of this shape.

        Raises:
            CheckpointError: there is none, or it has another shape.
        """
        found = self.find(name)
        if found is None:
            raise CheckpointError(f"`tuned` has no {name}. Is it of the same architecture?")
        if found.shape != shape:
            raise CheckpointError(
                f"{name} is {tuple(found.shape)} in `tuned` and {tuple(shape)} in the "
                "base. Resize the base's embeddings first, or leave it out of the config."
            )
        return found

    def find(self, name: str) -> Tensor | None:
        """The tensor, dense, or None."""
        if self.model is not None:
            path, _, leaf = name.rpartition(".")
            try:
                layer = self.model.get_submodule(path)
            except AttributeError:
                return None
            held = getattr(layer, leaf, None)
            return storage_of(layer, leaf).read(layer, leaf) if isinstance(held, Tensor) else None
        if name in self.files:
            with safe_open(self.files[name], "pt") as file:
                tensor: Tensor = file.get_tensor(name)
                return tensor
        return self.tensors.get(name)


def _files(source: Path) -> dict[str, Path]:
    """The file that holds each tensor.

    Raises:
        CheckpointError: there is no such file.
    """
    paths = [source] if source.is_file() else sorted(source.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(f"`tuned` (={str(source)!r}) holds no *.safetensors.")
    found: dict[str, Path] = {}
    for path in paths:
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found
