"""How a context changes the arguments of a model's ``generate``.

Virtual tokens go in as ``inputs_embeds`` beside the ``input_ids`` that the output begins with. That
is transformers' own way in: nothing is patched, and every kind of cache and of decoding goes on
from there. The ids that come back are the user's and the new ones.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from multigraft.errors import StateError
from multigraft.prompts.cache import put_cache
from multigraft.prompts.call import (
    Call,
    by_name,
    held,
    put_before,
    put_before_encoder,
)
from multigraft.prompts.config import is_encoder_decoder
from multigraft.prompts.contract import Context

ROWS = ("num_beams", "num_return_sequences")
"""Options that let several rows stand for each of the user's."""


def for_generation(
    context: Context, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Call:
    """The arguments of ``model.generate`` with the context in them.

    Raises:
        StateError: the call goes on from a filled cache, which has a context of its own.
    """
    call = by_name(model.generate, args, kwargs)  # type: ignore[arg-type]
    if call.get("inputs") is not None:
        call["input_ids"] = call.pop("inputs")
    if held(call):
        raise StateError(
            f"generate() with {context.name} cannot go on from a filled cache: it would count the "
            "virtual tokens in it among the ids. Give the whole sequence and no `past_key_values`."
        )
    if call.get("attention_mask") is None and call.get("input_ids") is not None:
        call["attention_mask"] = inferred_mask(model, call)
    if context.kind == "cache":
        beams, returned = (_option(model, call, name) or 1 for name in ROWS)
        put_cache(context, model, call, max(beams, returned))
        return call
    if is_encoder_decoder(model):
        put_before_encoder(context, model, call)
        return call
    ids = call.get("input_ids")
    if ids is not None:
        count_new_tokens(model, call, ids.shape[1])
    put_before(context, model, call)
    return call if ids is None else call | {"input_ids": ids}


def inferred_mask(model: nn.Module, call: Call) -> Tensor:
    """The mask ``(batch, tokens)`` that generate would infer from padding that is no stop."""
    ids = call["input_ids"]
    pad, stops = _option(model, call, "pad_token_id"), _option(model, call, "eos_token_id")
    stops = stops if isinstance(stops, (list, tuple)) else [stops]
    if pad is None or pad in stops:
        return torch.ones_like(ids)
    return ids.ne(pad).to(ids.dtype)


def count_new_tokens(model: nn.Module, call: Call, tokens: int) -> None:
    """Bounds on the whole length as bounds on what is new.

    Beside ``inputs_embeds`` generate subtracts the embedded tokens from the former, among which
    are the virtual ones, while the output does not hold those.
    """
    for bound in ("max", "min"):
        if _option(model, call, f"{bound}_new_tokens") is not None:
            continue
        length = _option(model, call, f"{bound}_length")
        if length is None:
            continue
        new = max(int(length) - tokens, 0)
        config = call.get("generation_config")
        if config is not None and call.get(f"{bound}_length") is None:
            call["generation_config"] = config = copy.copy(config)
            setattr(config, f"{bound}_new_tokens", new)
            setattr(config, f"{bound}_length", None)
        else:
            call.pop(f"{bound}_length", None)
            call[f"{bound}_new_tokens"] = new


def _option(model: nn.Module, call: Call, name: str) -> Any:
    """An option of generate: of the call, else of its config, else of the model's."""
    for source in (call.get("generation_config"), getattr(model, "generation_config", None)):
        if call.get(name) is None and getattr(source, name, None) is not None:
            return getattr(source, name)
    return call.get(name)
