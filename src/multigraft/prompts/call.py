"""How a context changes the arguments of a model's forward.

    tokens   inputs_embeds = [virtual; embedded]   attention_mask = [1; mask]   labels = [-100; …]
    cache    past_key_values = the prefix          attention_mask = [1; mask]

A cache that a first call has filled holds the context already: then only the mask and the positions
make room for it. Masks, positions and labels count the user's own tokens alone; what the model
returns counts the virtual ones too, as in PEFT.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from multigraft.config import TaskType
from multigraft.errors import UnsupportedError
from multigraft.prompts.config import words_of
from multigraft.prompts.contract import Context

Call = dict[str, Any]
"""A call's arguments, all by name."""

TYPES = ("token_type_ids", "mm_token_type_ids")
POSITIONS = ("start_positions", "end_positions")


def by_name(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    """The arguments of a call, positional ones under the names that ``function`` gives them."""
    if not args:
        return dict(kwargs)
    return dict(zip(inspect.signature(function).parameters, args, strict=False)) | dict(kwargs)


def parameters_of(model: nn.Module) -> Collection[str]:
    """Names of the arguments of the model's forward."""
    return inspect.signature(model.forward).parameters


def held(call: Call) -> int | None:
    """How many tokens the call's cache holds; None without a cache, or with an empty one."""
    cache = call.get("past_key_values")
    length = getattr(cache, "get_seq_length", None)
    return (int(length()) or None) if callable(length) else None


def put_before(context: Context, model: nn.Module, call: Call) -> None:
    """Virtual tokens before the user's, in all that counts tokens."""
    tokens = embed_before(context, model, call)
    extend_mask(context, call, "attention_mask")
    length = context.config.num_virtual_tokens
    for name in TYPES:
        if call.get(name) is not None:
            call[name] = _before(call[name], length, 0)
    if call.get("position_ids") is not None:
        given = call["position_ids"]
        own = torch.arange(length, device=given.device, dtype=given.dtype)
        call["position_ids"] = torch.cat(
            (own.expand(*given.shape[:-1], length), given + length), dim=-1
        )
    labels = call.get("labels")
    if labels is not None and labels.shape == tokens and not labels.is_floating_point():
        call["labels"] = _before(labels, length, -100)
    for name in POSITIONS:
        if call.get(name) is not None:
            call[name] = call[name] + length
    if pools_last(context, model):
        put_padding_first(model, call)


def pools_last(context: Context, model: nn.Module) -> bool:
    """Whether the model classifies by the last token that is no padding."""
    is_classifier = context.config.task_type == TaskType.SEQ_CLS
    return is_classifier and isinstance(getattr(model, "score", None), nn.Module)


def put_padding_first(model: nn.Module, call: Call) -> None:
    """Reorder each row so that its last token is no padding; every token keeps its position.

    Such a model looks for padding among ``input_ids``. From ``inputs_embeds`` it takes the very
    last token, and would classify by padding.
    """
    mask = call.get("attention_mask")
    if mask is None:
        return
    if call.get("position_ids") is None and "position_ids" in parameters_of(model):
        call["position_ids"] = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    order = mask.ne(0).to(torch.uint8).argsort(dim=1, stable=True)
    for name in ("attention_mask", "position_ids", *TYPES):
        if call.get(name) is not None:
            call[name] = call[name].expand(mask.shape).gather(1, order)
    embedded = call["inputs_embeds"]
    call["inputs_embeds"] = embedded.gather(1, order[..., None].expand(embedded.shape))


def put_before_encoder(context: Context, model: nn.Module, call: Call) -> None:
    """Virtual tokens before what the encoder reads; one that has run already has read them."""
    if call.get("encoder_outputs") is None:
        embed_before(context, model, call)
        extend_mask(context, call, "attention_mask")
    elif call.get("attention_mask") is not None:
        seen = call["encoder_outputs"][0].shape[1]
        if call["attention_mask"].shape[1] == seen - context.config.num_virtual_tokens:
            extend_mask(context, call, "attention_mask")


def embed_before(context: Context, model: nn.Module, call: Call) -> torch.Size:
    """``inputs_embeds`` with the virtual tokens in front, in place of ``input_ids``.

    Returns:
        (batch, tokens) of what the user gave.
    """
    ids, embedded = call.pop("input_ids", None), call.get("inputs_embeds")
    if embedded is None:
        if ids is None:
            raise UnsupportedError(
                f"{context.name} puts virtual tokens before the input, and the call has neither "
                "`input_ids` nor `inputs_embeds`."
            )
        embedded = words_of(model)(ids)
    table = context()[: context.config.num_virtual_tokens].to(embedded)
    call["inputs_embeds"] = torch.cat((table.expand(len(embedded), -1, -1), embedded), dim=1)
    return embedded.shape[:2]


def make_room(context: Context, call: Call, side: str = "") -> None:
    """Let the mask and the positions count the virtual tokens that the cache holds.

    Args:
        side: ``"decoder_"`` for the arguments of an encoder-decoder's decoder.
    """
    mask, positions = f"{side}attention_mask", f"{side}position_ids"
    names = (f"{side}input_ids", f"{side}inputs_embeds")
    given = next((call[name] for name in names if call.get(name) is not None), None)
    length = context.config.num_virtual_tokens
    if given is not None and call.get(mask) is not None:
        total = (held(call) or 0) + given.shape[1]
        if call[mask].shape[-1] == total - length:
            extend_mask(context, call, mask)
    if call.get(positions) is not None:
        call[positions] = call[positions] + length


def extend_mask(context: Context, call: Call, name: str) -> None:
    """Ones before a mask ``(batch, tokens)``, if there is one.

    Raises:
        UnsupportedError: it is of another shape, so that there is no telling what it masks.
    """
    mask = call.get(name)
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise UnsupportedError(
            f"`{name}` ({shape}) must be (batch, tokens) with {context.name}, which puts ones for "
            "its own tokens before it."
        )
    call[name] = _before(mask, context.config.num_virtual_tokens, 1)


def _before(tensor: Tensor, length: int, value: int) -> Tensor:
    """``length`` times ``value`` before a tensor ``(batch, tokens)``."""
    return torch.cat((tensor.new_full((len(tensor), length), value), tensor), dim=1)
