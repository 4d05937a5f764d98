"""Tensors by name in files that PEFT reads as well, of what data has shown."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from multigraft.atomic import write_files
from multigraft.errors import CheckpointError


def kept(path: str | os.PathLike[str] | None) -> dict[str, Tensor] | None:
    """The tensors in a file, on the CPU, or None where there is none.

    Raises:
        CheckpointError: it holds something else.
    """
    if path is None or not Path(path).is_file() or not Path(path).stat().st_size:
        return None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle raises whatever the damaged bytes happen to mean
        raise CheckpointError(f"{path} is damaged or holds more than tensors ({error}).") from error
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise CheckpointError(f"{path} holds no dictionary of names to tensors.")
    return found


def keep(path: str | os.PathLike[str] | None, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors into a file, atomically; its folder is made."""
    if path is not None:
        write_files({Path(path): lambda file: torch.save(dict(tensors), file)})


def taken(tensors: Mapping[str, Tensor], key: str, path: object, shape: tuple[int, ...]) -> Tensor:
    """One tensor of a file.

    Raises:
        CheckpointError: it is missing, or of another shape.
    """
    found = tensors.get(key)
    if found is None or tuple(found.shape) != shape:
        given = "missing" if found is None else f"of shape {tuple(found.shape)}"
        raise CheckpointError(
            f"{path}: `{key}` is {given} and must be {shape}. The file was made for another model, "
            "rank or method; remove it, or name another file."
        )
    return found
