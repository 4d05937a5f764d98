"""Prefixes that begin as what a model kept of tokens, rather than at random.

a cache of (keys, values), each (1, heads, tokens, size), per layer -> (tokens, layers * 2 * width)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from multigraft.errors import ConfigError, StateError, UnsupportedError
from multigraft.prompts.prefix_tuning import PrefixTuning

if TYPE_CHECKING:
    from multigraft.model import PeftModel


def prompt_embeddings_from_past_key_values(
    past_key_values: Any, *, num_virtual_tokens: int
) -> Tensor:
    """The first tokens of a cache of one sequence, as a prefix's file holds them.

    Args:
        past_key_values: a cache of transformers', or (keys, values) layer by layer.

    Returns:
        A table ``(num_virtual_tokens, layers * 2 * heads * size)``.

    Raises:
        ConfigError: it is empty, of several sequences, too short, or its layers are of several
            shapes.
    """
    layers = [tensor for pair in _pairs(past_key_values) for tensor in pair[:2]]
    if not layers:
        raise ConfigError("`past_key_values` holds no layer. Give what a forward returned.")
    shapes = {(t.shape[0], t.shape[1], t.shape[3]) for t in layers if t.dim() == 4}
    if len(shapes) != 1 or any(t.dim() != 4 for t in layers):
        raise ConfigError(
            "`past_key_values` must hold keys and values (1, heads, tokens, size) of one shape in "
            f"every layer; it has {sorted({tuple(t.shape) for t in layers})[:4]}."
        )
    rows, shortest = layers[0].shape[0], min(t.shape[2] for t in layers)
    if rows != 1:
        raise ConfigError(f"`past_key_values` has {rows} rows; give those of one sequence.")
    if shortest < num_virtual_tokens:
        raise ConfigError(
            f"`num_virtual_tokens` (={num_virtual_tokens}) are more than the {shortest} tokens of "
            "the cache. Give a longer text."
        )
    table = torch.stack([tensor[0, :, :num_virtual_tokens] for tensor in layers])
    return table.permute(2, 0, 1, 3).reshape(num_virtual_tokens, -1)


@torch.no_grad()
def initialize_kv_prefix_from_past_key_values(
    model: PeftModel,
    *,
    adapter_name: str | None = None,
    past_key_values: Any,
    num_virtual_tokens: int | None = None,
) -> Tensor:
    """Let a prefix begin as a cache's first tokens.

    Args:
        adapter_name: the active adapter by default.
        num_virtual_tokens: as many as the adapter has, by default.

    Returns:
        The table that the adapter holds now.

    Raises:
        UnsupportedError: the adapter is no prefix.
        ConfigError: a network makes the prefix, or the cache does not fit.
    """
    context = _prefix(model, adapter_name)
    count = num_virtual_tokens or context.config.num_virtual_tokens
    table = prompt_embeddings_from_past_key_values(past_key_values, num_virtual_tokens=count)
    context.load_prompt_embeddings(table)
    return table


@torch.no_grad()
def initialize_kv_prefix_from_text(
    model: PeftModel,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Let a prefix begin as what the base model keeps of a text.

    Args:
        use_chat_template: as a system message, where the tokeniser has a template for one.
        max_length: of the text, in tokens.

    Returns, raises: as `initialize_kv_prefix_from_past_key_values`.
    """
    _prefix(model, adapter_name)
    ids = _ids(tokenizer, text, use_chat_template, max_length)
    ids = ids.to(next(model.get_base_model().parameters()).device)
    with model.disable_adapter():
        kept = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
    return initialize_kv_prefix_from_past_key_values(
        model,
        adapter_name=adapter_name,
        past_key_values=kept.past_key_values,
        num_virtual_tokens=num_virtual_tokens,
    )


def _prefix(model: PeftModel, adapter: str | None) -> PrefixTuning:
    name = model.roster.first_active if adapter is None else model.roster.require_one(adapter)
    context = model.roster.context_of(name)
    if not isinstance(context, PrefixTuning):
        kind = model.peft_config[name].peft_type
        raise UnsupportedError(
            f"adapter `{name}` ({kind}) is no prefix that could begin as keys and values. Required "
            "is PREFIX_TUNING."
        )
    if context.config.prefix_projection:
        raise ConfigError(
            f"adapter `{name}`: `prefix_projection` (=True) makes the prefix by a network, whose "
            "own numbers cannot be told from it. Set it to False."
        )
    return context


def _pairs(cache: Any) -> Sequence[Any]:
    if hasattr(cache, "layers"):
        return [(layer.keys, layer.values) for layer in cache.layers]
    try:
        return list(cache)
    except TypeError:
        raise ConfigError(
            f"`past_key_values` (={type(cache).__name__}) must be a cache of transformers', or a "
            "list of (keys, values)."
        ) from None


def _ids(tokenizer: Any, text: str, use_chat_template: bool, most: int | None) -> Tensor:
    """Token ids ``(1, tokens)``."""
    if use_chat_template and getattr(tokenizer, "chat_template", None):
        message = [{"role": "system", "content": text}]
        options = {"tokenize": True, "add_generation_prompt": False, "return_dict": False}
        ids = tokenizer.apply_chat_template(message, return_tensors="pt", **options)[:, :most]
    else:
        cut = {"truncation": most is not None, "max_length": most}
        ids = tokenizer(text, return_tensors="pt", **cut)["input_ids"]
    if not ids.shape[-1]:
        raise StateError(f"`text` (={text!r}) has no token. Give a longer one.")
    found: Tensor = ids
    return found
