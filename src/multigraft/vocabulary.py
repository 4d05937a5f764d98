"""Adapters that were trained with tokens of their own: what they ask of the base, and its remedy.

An embedding that was resized has more rows than the base model that others have. Such adapters
bring these rows themselves (`modules_to_save`, `save_embedding_layers`, factors of the larger
embedding), so the base only has to have room for them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from multigraft.errors import MultigraftWarning
from multigraft.inspection.files import AdapterFiles


def fit_vocabulary(model: nn.Module, adapters: Iterable[AdapterFiles]) -> int | None:
    """Give the base as many rows as the adapter of the largest vocabulary has; says so.

    New rows are the mean of the others until an adapter brings its own.

    Returns:
        The number of rows, or None where there was room for all.
    """
    own = rows_of(model)
    wanted = {files.name: rows_needed(model, files) for files in adapters}
    name = max(wanted, key=lambda each: wanted[each] or 0, default=None)
    rows = wanted[name] if name is not None else None
    resize: Any = getattr(model, "resize_token_embeddings", None)
    if own is None or rows is None or rows <= own or resize is None:
        return None
    resize(rows, mean_resizing=False)
    with torch.no_grad():
        for module in embeddings_of(model).values():
            weight: Any = module.weight
            weight[own:] = weight[:own].mean(0, dtype=torch.float32).to(weight.dtype)
            weight.requires_grad_(False)
    warnings.warn(
        f"`{name}` has a vocabulary of {rows:,}: the base's embeddings were resized to it, from "
        f"{own:,}.",
        MultigraftWarning,
        stacklevel=3,
    )
    return rows


def embeddings_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that have a row for each token, input and head, by path."""
    found = {}
    for name in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(model, name, lambda: None)()
        if isinstance(module, nn.Module) and getattr(module, "weight", None) is not None:
            path = next((path for path, each in model.named_modules() if each is module), None)
            if path is not None:
                found[path] = module
    return found


def rows_of(model: nn.Module) -> int | None:
    """How many tokens the base's input embedding has rows for."""
    found: Any = next(iter(embeddings_of(model).values()), None)
    return None if found is None else int(found.weight.shape[0])


def rows_needed(model: nn.Module, files: AdapterFiles) -> int | None:
    """How many rows an adapter's own tensors of these modules have, where it has some."""
    rows = []
    for path in embeddings_of(model):
        for name, axis in (("weight", 0), ("base_layer.weight", 0), ("lora_embedding_A", 1)):
            tensor = files.tensors.get(f"{path}.{name}")
            if tensor is not None and tensor.dim() == 2:
                rows.append(int(tensor.shape[axis]))
    return max(rows, default=None)
