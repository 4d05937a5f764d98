"""Making a base model ready for training adapters on it, above all a quantised one (QLoRA).

Paper: Dettmers et al. 2023, arXiv:2305.14314.
Departs: asks each weight how it is stored, and no flag of the model whether it is quantised, so a
model whose layers were quantised by hand is served as well as one that transformers loaded.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from multigraft.errors import MultigraftWarning, StateError
from multigraft.gradients import let_gradients_in
from multigraft.storage import holder, let_gradients_through, storage_of
from multigraft.survey import adapted_layers
from multigraft.tuner import base_of

HALF = (torch.float16, torch.bfloat16)
WIDENED = frozenset({"bnb4", "bnb8", "bitsandbytes"})
"""Formats whose models run with float32 norms and heads; others expect the dtype they came in."""


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Freeze a base model and make its training stable; call it before adding adapters.

    Every parameter is frozen. Unquantised half-precision parameters (norms, embeddings, the head)
    become float32, unless the quantiser is one that expects them as they are. On a quantised model
    gradients are checkpointed, and the input embeddings' output requires a gradient so that
    reentrant checkpointing lets gradients through.

    Args:
        model: changed in place; a plain model is frozen and widened only.
        use_gradient_checkpointing: trade time for memory on a quantised model.
        gradient_checkpointing_kwargs: options of `torch.utils.checkpoint.checkpoint`;
            ``use_reentrant`` is True where they don't say.
        auto_clear_cache: give memory that widening has freed back to the device.

    Returns:
        The same model.

    Raises:
        StateError: the model has adapters; they would be frozen too.
    """
    base = base_of(model)
    if adapted_layers(base):
        raise StateError(
            "the model has adapters, which prepare_model_for_kbit_training() would freeze with "
            "the base. Prepare the base model first, and add adapters after."
        )
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    formats = _formats(base)
    if formats <= WIDENED:
        _widen(base)
        if auto_clear_cache and torch.cuda.is_available():
            torch.cuda.empty_cache()
    let_gradients_through(base)
    if formats and use_gradient_checkpointing:
        _checkpoint(base, {"use_reentrant": True, **(gradient_checkpointing_kwargs or {})})
    return model


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Store what is frozen in ``dtype`` and what trains in float32, for mixed-precision training.

    Quantised weights and integers stay as they are stored.

    Args:
        dtype: `torch.float16` or `torch.bfloat16`, whichever autocast is to use.
    """
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.dtype.is_floating_point:
                    to = torch.float32 if parameter.requires_grad else dtype
                    if parameter.dtype != to and storage_of(module, name).is_exact:
                        parameter.data = parameter.data.to(to)


def _formats(model: nn.Module) -> set[str]:
    """Names of the formats that quantised weights are stored in, none for a plain model.

    A quantiser may keep its layers' tensors where no storage is registered for them yet, so what
    transformers says about the model counts too.
    """
    stored = (storage_of(m) for m in model.modules() if holder(m) is not None)
    found = {storage.name for storage in stored if not storage.is_exact}
    stated = getattr(model, "quantization_method", None)
    if stated is not None:
        found.add(str(getattr(stated, "value", stated)))
    return found | ({"hqq"} if getattr(model, "hqq_quantized", False) else set())


def _widen(model: nn.Module) -> None:
    """Make plain half-precision parameters float32; a packed weight's dtype means nothing."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            is_half = parameter is not None and parameter.dtype in HALF
            if parameter is not None and is_half and storage_of(module, name).is_exact:
                parameter.data = parameter.data.float()


def _checkpoint(model: Any, options: dict[str, Any]) -> None:
    """Switch gradient checkpointing on, under transformers' present or former name for it."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    enable = enable or getattr(model, "gradient_checkpointing_enable", None)
    if enable is None:
        warnings.warn(
            f"{type(model).__name__} has no gradient_checkpointing_enable(): its activations are "
            "all kept. Pass use_gradient_checkpointing=False to say that this is meant.",
            MultigraftWarning,
            stacklevel=3,
        )
        return
    names = [n for n in inspect.signature(enable).parameters if n.endswith("checkpointing_kwargs")]
    enable(**dict.fromkeys(names, options))
    if options["use_reentrant"] and hasattr(model, "enable_input_require_grads"):
        let_gradients_in(model)
    elif options["use_reentrant"]:
        model.get_input_embeddings().register_forward_hook(_with_gradient)


def _with_gradient(module: nn.Module, args: Any, output: Tensor) -> None:
    output.requires_grad_(True)
