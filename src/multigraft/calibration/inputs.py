"""What of a batch counts for EVA: PEFT's defaults for language models, and their plumbing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from multigraft.errors import DataError


def forward_fn_dict(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """The model run on a batch that is a dictionary of its arguments."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: Any) -> Tensor:
    """Indices of the tokens that count, ``(tokens, 2)``: not padding, and with a label if asked.

    Raises:
        DataError: the batch is no dictionary with ``input_ids``.
    """
    if not isinstance(model_input, Mapping) or "input_ids" not in model_input:
        raise DataError(
            f"EVA: a batch (={type(model_input).__name__}) must be a dictionary with `input_ids`. "
            "For other data pass prepare_model_inputs_fn=None and prepare_layer_inputs_fn=None, "
            "or functions of your own."
        )
    mask = model_input.get("attention_mask")
    mask = torch.ones_like(model_input["input_ids"]) if mask is None else mask
    options = peft_config.eva_config
    mask = mask.bool()
    if options.use_label_mask and "labels" in model_input:
        mask = mask & (model_input["labels"] != options.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(
    layer_input: Any, model_input: Tensor, layer_name: str
) -> Tensor:
    """The inputs of a layer at the tokens that count, ``(n, in)``.

    Args:
        layer_input: what the layer is given, ``(batch, tokens, in)``, or a tuple that begins so.
        model_input: indices of the tokens, ``(n, 2)``.
    """
    rows: Tensor = first_tensor(layer_input, layer_name)[model_input.T.unbind()]
    return rows


def all_rows(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    """All inputs of a layer, ``(n, in)``."""
    x = first_tensor(layer_input, layer_name)
    return x.reshape(-1, x.shape[-1])


def first_tensor(layer_input: Any, layer_name: str) -> Tensor:
    """A layer's own input: the tensor, or the first of its arguments.

    Raises:
        DataError: that is no tensor.
    """
    found = layer_input
    if isinstance(found, (tuple, list)) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise DataError(
            f"EVA: the input of {layer_name} (={type(found).__name__}) is no tensor. Pass a "
            "prepare_layer_inputs_fn that makes one of it."
        )
    return found


def moved(batch: Any, device: torch.device | None) -> Any:
    """A batch with its tensors on this device."""
    if device is None:
        return batch
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(moved(value, device) for value in batch)
    return batch


def of_all_ranks(rows: Tensor) -> Tensor:
    """These rows of every process, one after another, where there are several processes."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, rows.cpu())
    return torch.cat(found).to(rows.device)


def fingerprint(rows: Tensor) -> tuple[Any, ...]:
    """Numbers that are equal for equal rows and, but by a freak of chance, for no others."""
    v = rows.double().flatten()
    weights = torch.arange(v.numel(), dtype=torch.float64, device=v.device).sin()
    return (*rows.shape, float(v.sum()), float(v.square().sum()), float((v * weights).sum()))
