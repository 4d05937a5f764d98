"""The model that a run would train, without memory: base, quantisation, adapters, a batch."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from multigraft.auto import get_peft_model
from multigraft.config import PeftConfig
from multigraft.errors import ConfigError, RoutingError, UnsupportedError, did_you_mean
from multigraft.kbit import prepare_model_for_kbit_training
from multigraft.model import PeftModel
from multigraft.planning.packed import pack
from multigraft.planning.request import Load

CHECKPOINTED = {"use_reentrant": False}


def bones(source: Any, head: str | None = None) -> nn.Module:
    """A base model of one's own on the meta device.

    Args:
        source: a directory or an id on the hub, a config of transformers, or a model, which is
            left alone; its values are not looked at.
        head: a class of transformers, in place of the one that the source names; a model has its
            own.

    Raises:
        CheckpointError: nothing can be made of the source.
        ConfigError: it is something else.
    """
    from multigraft.train.skeleton import load_skeleton

    if isinstance(source, nn.Module):
        return _without_memory(source)
    if isinstance(source, (str, os.PathLike)):
        found = load_skeleton(source)
        if head is None:
            return found
        source = found.config
    if hasattr(source, "to_dict") and hasattr(source, "model_type"):
        with torch.device("meta"):
            model: nn.Module = _class(source, head)(copy.deepcopy(source))
        return model.eval()
    raise ConfigError(
        f"`model` (={type(source).__name__}) must be a directory, an id on the hub, a config of "
        "transformers, or a model."
    )


def _class(config: Any, head: str | None) -> Any:
    from multigraft.train.skeleton import model_class

    if head is None:
        return model_class(config)
    import transformers

    return getattr(transformers, head).from_config


def _without_memory(model: nn.Module) -> nn.Module:
    """A copy on the meta device, made without copying any value."""
    named = (*model.parameters(), *model.buffers())
    memo: dict[int, Any] = {id(t): _shadow(t) for t in named}
    return copy.deepcopy(model, memo).eval()


def _shadow(tensor: Tensor) -> Tensor:
    bare = torch.empty_like(tensor, device="meta")
    return nn.Parameter(bare, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare


def frozen_base(model: nn.Module, dtype: str, quantize: str | None, checkpointing: bool) -> None:
    """Make a model the base that a run would have: in its dtype, packed, frozen, checkpointed.

    Raises:
        ConfigError: there is no such dtype or format, or the model cannot be checkpointed.
    """
    kind = dtype_of(model, dtype)
    config: Any = getattr(model, "config", None)
    if config is not None and getattr(config, "pad_token_id", 0) is None:
        config.pad_token_id = 0  # classifiers ask where a row ends; a run takes the tokeniser's
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(kind)
    experts = getattr(model, "_can_set_experts_implementation", None)
    if experts is not None and experts():
        model.set_experts_implementation("grouped_mm")  # type: ignore[operator]
    if quantize is not None:
        pack(model, quantize, kind)
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if checkpointing:
        checkpoint_blocks(model)


def checkpoint_blocks(model: nn.Module) -> None:
    """Let a base compute its blocks again in the backward pass, whatever of it is frozen.

    Raises:
        ConfigError: it cannot.
    """
    enable: Any = getattr(model, "activation_checkpointing_enable", None)
    enable = enable or getattr(model, "gradient_checkpointing_enable", None)
    if enable is None or not getattr(model, "supports_gradient_checkpointing", True):
        raise ConfigError(
            f"`gradient_checkpointing`: {type(model).__name__} does not support it. Leave it out, "
            "and lower `batch_size`."
        )
    names = [n for n in inspect.signature(enable).parameters if n.endswith("checkpointing_kwargs")]
    enable(**{name: dict(CHECKPOINTED) for name in names})


def dtype_of(model: nn.Module, name: str) -> torch.dtype:
    """The dtype of that name; ``"auto"`` is the checkpoint's own.

    Raises:
        ConfigError: there is no such name.
    """
    from multigraft.train.load import DTYPES

    if name == "auto":
        stated = getattr(getattr(model, "config", None), "dtype", None)
        own = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        return stated if isinstance(stated, torch.dtype) else own
    if name not in DTYPES:
        raise ConfigError(
            f"`dtype` (={name!r}) must be one of auto, {', '.join(DTYPES)}."
            f"{did_you_mean(name, DTYPES)}"
        )
    return DTYPES[name]


def adapted(base: nn.Module, adapters: Mapping[str, PeftConfig]) -> PeftModel:
    """The base with these adapters, all of which train.

    Raises:
        ConfigError: there is none.
        TargetError: one does not fit the model.
    """
    model: Any = base
    for name, config in adapters.items():
        if isinstance(model, PeftModel):
            model.add_adapter(name, config, low_cpu_mem_usage=True)
        else:
            model = get_peft_model(model, config, name, low_cpu_mem_usage=True)
    if model is base:
        raise ConfigError("`adapters`: a plan needs at least one adapter's config.")
    model.roster.set_requires_grad(list(adapters), True)
    model.train()
    return model


def companies(model: PeftModel, loads: Sequence[Load]) -> list[list[Load]]:
    """Which adapters share a forward, by the rule of a run.

    Apart stay those that cannot serve single rows, and rows so much longer than the others that
    most of the batch would be padding.
    """
    from multigraft.train.together import MOST_PADDING

    found: list[list[Load]] = []
    apart = [load for load in loads if not _is_batchable(model, load.name)]
    for load in sorted((x for x in loads if x not in apart), key=lambda x: -x.tokens):
        for company in found:
            whole = [*company, load]
            own = sum(each.rows * each.tokens for each in whole)
            if sum(each.rows for each in whole) * company[0].tokens <= MOST_PADDING * own:
                company.append(load)
                break
        else:
            found.append([load])
    return [*found, *([load] for load in apart)]


def _is_batchable(model: PeftModel, name: str) -> bool:
    try:
        model.roster.check_batchable(name)
    except RoutingError:
        return False
    return True


def arguments(base: nn.Module, rows: int, tokens: int) -> dict[str, Any]:
    """What the model is called with: padded rows.

    Raises:
        UnsupportedError: its input is neither text nor images.
    """
    config = getattr(base, "config", None)
    name = getattr(base, "main_input_name", "input_ids")
    if name == "pixel_values":
        size = getattr(config, "image_size", 224)
        sides = (size, size) if isinstance(size, int) else tuple(size)
        channels = getattr(config, "num_channels", 3)
        kind = next(p.dtype for p in base.parameters() if p.is_floating_point())
        return {name: torch.empty(rows, channels, *sides, dtype=kind, device="meta")}
    if name != "input_ids":
        raise UnsupportedError(
            f"{type(base).__name__} takes `{name}`; plans are made for text and images."
        )
    ids = torch.empty(rows, tokens, dtype=torch.long, device="meta")
    found: dict[str, Any] = {name: ids, "attention_mask": torch.empty_like(ids)}
    if getattr(config, "is_encoder_decoder", False):
        found["decoder_input_ids"] = torch.empty_like(ids)
    if hasattr(config, "use_cache"):
        found["use_cache"] = False
    return found


def loss(outputs: Any, batch: Mapping[str, Any]) -> Tensor:
    """A loss that costs what the run's costs at most: every token is learned.

    Args:
        outputs: the model's, whose logits are ``(rows, tokens, classes)`` or ``(rows, classes)``.
    """
    logits = getattr(outputs, "logits", None)
    if logits is None:
        return outputs.last_hidden_state.float().mean()
    ids = batch.get("decoder_input_ids", batch.get("input_ids"))
    if logits.dim() == 3 and ids is not None:
        from multigraft.train.tasks.causal_lm import row_losses

        return row_losses(logits, ids).sum()
    classes = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    return nn.functional.cross_entropy(logits.float().flatten(0, -2), classes.flatten())
