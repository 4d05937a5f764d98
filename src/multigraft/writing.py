"""Writing tensors to a safetensors file from where they lie.

The format's own `save_file` looks for shared memory and makes an array of every tensor first: for
the hundreds of small ones of an adapter that takes as long as the rest of saving. Where the library
takes addresses (from 0.8 on), they are given to it; where it does not, `save_file` writes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

METADATA = {"format": "pt"}
SPEC: Any = getattr(safetensors, "TensorSpec", None) if sys.byteorder == "little" else None
"""How the library takes an address, if it does; the format is little-endian."""


def write_tensors(state: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors under these very names, in place.

    Raises:
        OSError: the disk refuses, or the format has no such dtype.
    """
    tensors = {key: tensor.detach().to("cpu").contiguous() for key, tensor in state.items()}
    try:
        if SPEC is None:
            save_file(_apart(tensors), path, METADATA)
        else:
            specs = {key: _spec(tensor) for key, tensor in tensors.items()}
            safetensors.serialize_file(specs, str(path), METADATA)
    except SafetensorError as error:  # in which it wraps what the disk says
        raise OSError(f"{path.name}: {error}") from error


def _spec(tensor: Tensor) -> Any:
    """Where a tensor lies; whoever calls keeps it."""
    name = str(tensor.dtype).removeprefix("torch.")
    return SPEC(
        dtype=name,
        shape=tensor.shape,
        data_ptr=tensor.data_ptr(),
        data_len=tensor.numel() * tensor.element_size(),
    )


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """No two in one memory, which `save_file` refuses (a stand-in's tied weights, say)."""
    memories: set[int] = set()
    found = {}
    for key, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        found[key] = tensor.clone() if memory in memories else tensor
        memories.add(memory)
    return found
