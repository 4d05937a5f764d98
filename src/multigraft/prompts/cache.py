"""A prefix as the cache that a model goes on from.

    table: (tokens, layers * 2 * width)
    keys and values of each layer: (batch, heads, tokens, size)

The model takes it for tokens that it has seen: masks, positions and every kind of decoding go on
from there as they do after a first call.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from multigraft.errors import StateError, UnsupportedError
from multigraft.gradients import checkpoints_gradients
from multigraft.prompts.call import Call, extend_mask, held, make_room
from multigraft.prompts.config import is_encoder_decoder, tell
from multigraft.prompts.contract import Context

ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Kinds of layers, as transformers' configs call them, that keep keys and values."""


def put_cache(context: Context, model: nn.Module, call: Call, repeats: int = 1) -> None:
    """The prefix in ``past_key_values``, and room for it in the mask and the positions.

    Args:
        repeats: how many rows stand for each of the user's (beams, returned sequences).

    Raises:
        StateError: the model checkpoints gradients, and then reads no cache in training.
    """
    if model.training and torch.is_grad_enabled() and checkpoints_gradients(model):
        raise StateError(
            f"{context.name} goes through the cache, which the model does not read while it "
            "checkpoints gradients: the prefix would get none. Call "
            "gradient_checkpointing_disable()."
        )
    side = "decoder_" if is_encoder_decoder(model) else ""
    if held(call):
        make_room(context, call, side)
        return
    extend_mask(context, call, f"{side}attention_mask")
    positions = f"{side}position_ids"
    if call.get(positions) is not None:
        call[positions] = call[positions] + context.config.num_virtual_tokens
    call["past_key_values"] = filled_cache(
        context, model, _rows(context, call) * repeats, call.get("past_key_values")
    )


def keys_and_values(context: Context, model: nn.Module, batch: int) -> list[tuple[Tensor, Tensor]]:
    """The prefix of each layer: keys and values ``(batch, heads, tokens, size)``."""
    config, table = context.config, context()
    dtype = getattr(model, "dtype", None)
    table = table.to(dtype) if isinstance(dtype, torch.dtype) else table
    heads = config.num_attention_heads
    parts = table.reshape(len(table), config.num_layers * 2, heads, config.token_dim // heads)
    parts = parts.permute(1, 2, 0, 3)
    both = [part.expand(batch, *part.shape) for part in parts]
    return list(zip(both[::2], both[1::2], strict=True))


def empty_cache(model: nn.Module) -> Any:
    """A cache of transformers' that fits the model's layers."""
    from transformers import DynamicCache, EncoderDecoderCache

    if is_encoder_decoder(model):
        part: Any = model
        config = part.get_decoder().config  # which may have more layers than the encoder, or fewer
        return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
    return DynamicCache(config=model.config)


def filled_cache(context: Context, model: nn.Module, batch: int, cache: Any = None) -> Any:
    """A cache (the given empty one, or a new one) with the prefix of each layer in it.

    Layers with narrower keys than the prefix take its first part.
    """
    cache = empty_cache(model) if cache is None else cache
    own = getattr(cache, "self_attention_cache", cache)
    for index, (keys, values) in enumerate(keys_and_values(context, model, batch)):
        if index in context.layers:
            heads, size = context.layers[index]
            own.update(keys[:, :heads, :, :size], values[:, :heads, :, :size], index)
    return cache


def check_takes_cache(name: str, model: nn.Module) -> None:
    """Fail unless the model goes on from a cache that it is given.

    Raises:
        UnsupportedError: it takes none.
        StateError: it checkpoints gradients, and then reads none in training.
    """
    part = getattr(model, getattr(model, "base_model_prefix", "") or "", model)
    if "past_key_values" not in inspect.signature(part.forward).parameters:
        raise UnsupportedError(
            f"{name} needs a model that takes `past_key_values`, and {type(part).__name__} does "
            "not. Prompt tuning and p-tuning do without."
        )
    if checkpoints_gradients(model):
        raise StateError(
            f"{name} does not work with gradient checkpointing, under which the model reads no "
            "cache. Call gradient_checkpointing_disable() first."
        )


def key_shape(name: str, model: nn.Module) -> tuple[int, int] | None:
    """(heads, size of one) of the model's keys, as far as its config tells; of the widest ones.

    Raises:
        UnsupportedError: its cache holds something else.
    """
    kinds = set(tell(model, "layer_types") or ()) - ATTENTION
    if kinds:
        raise UnsupportedError(
            f"{name} gives keys and values to every layer, and {type(model).__name__} has layers "
            f"that keep something else ({', '.join(sorted(kinds))}). Prompt tuning and p-tuning "
            "do without."
        )
    if tell(model, "kv_lora_rank"):
        raise UnsupportedError(
            f"{name} gives keys and values, and {type(model).__name__} keeps them in a compressed "
            "form (latent attention). Prompt tuning and p-tuning do without."
        )
    shapes = layer_shapes(model)
    if len(set(shapes)) > 1:
        return max(shapes, key=lambda shape: shape[1])
    queries = tell(model, "num_attention_heads", "n_head", "num_heads")
    if is_encoder_decoder(model):
        queries = tell(model, "decoder_attention_heads") or queries
    if not queries:
        return None
    # Falcon's later architecture shares keys among groups, and repeats them in the cache.
    is_one = tell(model, "multi_query") and not tell(model, "new_decoder_architecture")
    heads = tell(model, "num_key_value_heads") or (1 if is_one else queries)
    width = tell(model, "hidden_size", "n_embd", "d_model")
    size = tell(model, "head_dim", "d_kv") or (width // queries if width else None)
    return (int(heads), int(size)) if size else None


def layers_with_prefix(config: Any, model: nn.Module) -> dict[int, tuple[int, int]]:
    """(heads, size of one) of the keys of each layer that takes the prefix, by the layer's index.

    The prefix is as wide as the widest keys. Layers with more heads than those have none, as in
    PEFT, nor have those that read another layer's keys.
    """
    own = config.num_attention_heads, config.token_dim // config.num_attention_heads
    shapes, shared = layer_shapes(model), list(tell(model, "kv_sharing_modes") or ())
    if len(set(shapes)) < 2:
        shapes = [own] * config.num_layers
    reads_another = [mode == "reuse" for mode in shared] or [False] * config.num_layers
    return {
        index: shape
        for index, (shape, is_reader) in enumerate(zip(shapes, reads_another, strict=False))
        if shape[0] <= own[0] and not is_reader
    }


def layer_shapes(model: nn.Module) -> list[tuple[int, int]]:
    """(heads, size of one) of the keys of each layer, where the config tells it layer by layer."""
    layers = tell(model, "per_layer_config") or ()
    told = [(getattr(x, "num_key_value_heads", 0), getattr(x, "head_dim", 0)) for x in layers]
    return [(int(heads), int(size)) for heads, size in told if heads and size]


def _rows(context: Context, call: Call) -> int:
    """How many rows the user's batch has."""
    for name in ("input_ids", "inputs_embeds", "encoder_outputs", "decoder_input_ids"):
        given = call.get(name)
        if given is not None:
            return len(given if isinstance(given, Tensor) else given[0])
    raise UnsupportedError(
        f"{context.name} has as many rows as the input, and the call has neither `input_ids` nor "
        "`inputs_embeds`."
    )
