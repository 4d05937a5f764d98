"""How a context changes the arguments of a model's forward, kind by kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from multigraft.prompts.cache import put_cache
from multigraft.prompts.call import (
    Call,
    by_name,
    held,
    make_room,
    put_before,
    put_before_encoder,
)
from multigraft.prompts.config import is_encoder_decoder
from multigraft.prompts.contract import Context


def with_context(
    context: Context, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Call:
    """The arguments of ``model``'s forward with the context in them."""
    call = by_name(model.forward, args, kwargs)
    if context.kind == "cache":
        put_cache(context, model, call)
    elif is_encoder_decoder(model):
        put_before_encoder(context, model, call)
    elif held(call):
        make_room(context, call)
    else:
        put_before(context, model, call)
    return call
