"""Small things of PEFT's inside that other packages import, in Multigraft's terms."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from multigraft.config import PeftType
from multigraft.defaults import LORA_TARGETS
from multigraft.errors import ConfigError
from multigraft.layer_verbs import delete_for_peft
from multigraft.methods import METHODS
from multigraft.methods.lokr import split
from multigraft.reading import CONFIG_NAME, PICKLE_NAME
from multigraft.reading import WEIGHTS_NAME as SAFETENSORS_WEIGHTS_NAME
from multigraft.tuner import Tuner, base_of

__all__ = [
    "CONFIG_NAME",
    "EMBEDDING_LAYER_NAMES",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "SAFETENSORS_WEIGHTS_NAME",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "WEIGHTS_NAME",
    "cast_adapter_dtype",
    "delete_adapter",
    "factorization",
    "fsdp_auto_wrap_policy",
    "infer_device",
    "set_adapter",
    "set_requires_grad",
    "transpose",
]

EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]
INCLUDE_LINEAR_LAYERS_SHORTHAND = "all-linear"
WEIGHTS_NAME = PICKLE_NAME
TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING = dict(LORA_TARGETS)
_PREFIXES = {"LN_TUNING": "ln_tuning_", "VERA": "vera_lambda_"}
PEFT_TYPE_TO_PREFIX_MAPPING = {
    kind: _PREFIXES.get(str(kind), METHODS[str(kind)].prefix)
    for kind in PeftType
    if str(kind) in METHODS
}
"""How the names of a method's tensors begin; two methods are told apart more closely here."""
factorization = split
"""Two factors of a size, as near to each other as they go; LoKr's."""

HALF = (torch.float16, torch.bfloat16)


def set_adapter(
    model: nn.Module, adapter_name: str | Sequence[str], inference_mode: bool = False, **_: Any
) -> None:
    """Make exactly these adapters active, and trainable unless ``inference_mode``.

    Raises:
        AdapterNameError: there is no such adapter.
    """
    Tuner(base_of(model)).set_adapter(adapter_name, inference_mode)


_set_adapter = set_adapter


def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str = "", layer_cls: type | None = None
) -> list[str] | None:
    """Remove an adapter; the caller takes its config out of ``model.peft_config``.

    Args:
        prefix, layer_cls: kept for PEFT's signature.

    Returns:
        The adapters that are active now, or None.

    Raises:
        AdapterNameError: there is no such adapter.
    """
    tuner = Tuner(base_of(model))
    delete_for_peft(tuner, adapter_name)
    return tuner.active_adapters or None


def set_requires_grad(
    model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True
) -> None:
    """Freeze or thaw these adapters.

    Raises:
        AdapterNameError: there is no such adapter.
    """
    Tuner(base_of(model)).set_requires_grad(adapter_names, requires_grad)


def cast_adapter_dtype(
    model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True
) -> None:
    """Keep an adapter's half-precision parameters in float32 from now on.

    Raises:
        AdapterNameError: there is no such adapter.
    """
    roster = Tuner(base_of(model)).roster
    roster.require_one(adapter_name)
    if autocast_adapter_dtype:
        for parameter in roster.parameters(adapter_name):
            if parameter.dtype in HALF:
                parameter.data = parameter.data.float()


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """The parent of the module at a path, the module, and its name there.

    Raises:
        AttributeError: there is none.
    """
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """The weight, turned if it is stored with its inputs first.

    Args:
        weight: ``(out, in)``, or ``(in, out)`` with ``fan_in_fan_out``.
    """
    if not fan_in_fan_out:
        return weight
    return nn.Parameter(weight.T) if isinstance(weight, nn.Parameter) else weight.T


def infer_device() -> str:
    """The kind of accelerator that torch finds here, or ``"cpu"``."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None else found.type


def fsdp_auto_wrap_policy(model: nn.Module) -> Any:
    """What FSDP shards as a unit: the model's blocks, and each small module that trains.

    So frozen and trained parameters never share a flat one. Blocks are those that the variable
    ``FSDP_TRANSFORMER_CLS_TO_WRAP`` names, else those that the model itself says not to split.

    Raises:
        ConfigError: the model has no module of a class that is named.
    """
    from torch.distributed.fsdp.wrap import (
        _or_policy,
        lambda_auto_wrap_policy,
        transformer_auto_wrap_policy,
    )

    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    wanted = named.split(",") if named is not None else sorted(_unsplit(model))
    classes = {type(m).__name__: type(m) for m in model.modules()}
    missing = [name for name in wanted if name and name not in classes]
    if missing and named is not None:
        raise ConfigError(
            f"FSDP_TRANSFORMER_CLS_TO_WRAP names {missing}, of which the model has none. Name the "
            "class of its repeated block."
        )
    blocks = {classes[name] for name in wanted if name in classes}
    policies = [
        functools.partial(lambda_auto_wrap_policy, lambda_fn=_is_trained_leaf),
        functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=blocks),
    ]
    return functools.partial(_or_policy, policies=policies)


def _unsplit(model: nn.Module) -> set[str]:
    return {name for m in model.modules() for name in getattr(m, "_no_split_modules", None) or ()}


def _is_trained_leaf(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return not list(module.children()) and weight is not None and weight.requires_grad
