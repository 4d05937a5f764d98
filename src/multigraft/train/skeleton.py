"""A base model without its weights: every module and shape, from ``config.json`` alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from multigraft.errors import CheckpointError, MissingExtraError
from multigraft.train.load import fetch


def load_skeleton(source: str | os.PathLike[str], *, with_buffers: bool = False) -> nn.Module:
    """The model that a directory or an id on the hub describes, on the meta device.

    No code that lies beside the config is run, and no weights are read.

    Args:
        with_buffers: only the parameters are on the meta device; what modules compute for
            themselves (rotary frequencies) has its values.

    Raises:
        CheckpointError: there is no config there, or it describes no model that is known.
        MissingExtraError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(
            "reading a base model's config needs transformers: pip install 'multigraft[train]'"
        ) from error
    read = transformers.AutoConfig.from_pretrained
    config = fetch(source, "config", read, trust_remote_code=False)
    try:
        with parameters_on_meta() if with_buffers else torch.device("meta"):
            model: nn.Module = model_class(config)(config)
    except Exception as error:  # whatever an architecture trips over when a number makes no sense
        raise CheckpointError(
            f"{os.fspath(source)}: its config makes no model ({type(error).__name__}: {error})."
        ) from error
    model.name_or_path = os.fspath(source)  # type: ignore[assignment]
    return model.eval()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made in the block have their parameters on the meta device, and real buffers.

    A weight is allocated for a moment and never written to, so it takes no memory.
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # a tied one stays the same object
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def load_base(source: str | os.PathLike[str], *, dtype: str = "auto") -> nn.Module:
    """The same with its weights, on the CPU, whatever task it is for.

    Raises:
        CheckpointError: there is no such model, or it cannot be read.
    """
    bones = load_skeleton(source)  # what cannot be built is said before gigabytes are read
    load: Any = type(bones).from_pretrained  # type: ignore[attr-defined]
    model: nn.Module = fetch(source, "model", load, dtype=dtype)
    model.name_or_path = os.fspath(source)  # type: ignore[assignment]
    return model.eval()


def model_class(config: Any) -> Any:
    """What builds a model from a config: the class that it names, or its architecture's usual."""
    import transformers as library

    transformers: Any = library
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, str(name), None)
        is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
        if is_model:
            return found._from_config  # type: ignore[union-attr]
    is_known = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    usual = transformers.AutoModelForCausalLM if is_known else transformers.AutoModel
    return usual.from_config
