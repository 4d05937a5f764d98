"""Sites of trained tokens: those that ride on another method's config, and heads that share them.

A head shares an embedding's rows when the two hold the same parameter: by identity, whatever the
model's config says about tying.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import nn

from multigraft.bases import geometry_of
from multigraft.config import PeftConfig
from multigraft.errors import TargetError, did_you_mean
from multigraft.methods import METHODS
from multigraft.needs import Need, module_needs
from multigraft.survey import Spot

FIELD = "trainable_token_indices"


def token_needs(
    model: nn.Module, config: PeftConfig, spots: Sequence[Spot], taken: Collection[int]
) -> list[Need]:
    """What ``trainable_token_indices`` means: the input embedding, or the modules that it names.

    Args:
        taken: identities of spots that the adapter copies whole.

    Raises:
        TargetError: no module is meant, or one that the adapter copies whole.
    """
    wanted = getattr(config, FIELD, None)
    if not wanted:
        return []
    method = METHODS["TOKEN_ADAPTER"]
    if isinstance(wanted, Mapping):
        found = [spot for name in wanted for spot in _called(name, spots)]
    else:
        found = _input_embedding(model, spots)
    for spot in found:
        if id(spot) in taken:
            raise TargetError(
                f"`{FIELD}`: {spot.path} is in `modules_to_save` as well, which trains all of its "
                "rows. Leave it out of one of the two."
            )
    return [need for spot in found for need in module_needs(spot, method)]


def with_ties(needs: Sequence[Need], spots: Sequence[Spot]) -> list[Need]:
    """The needs, and more of them where other modules share an embedding's weight.

    Raises:
        TargetError: a sharing module is asked for with rows of its own, or cannot be adapted.
    """
    heads: dict[int, Need] = {}
    for need in needs:
        if need.method.follows_ties and isinstance(need.site.layer, nn.Embedding):
            for spot in _sharing(need.spot, spots):
                (head,) = module_needs(spot, need.method)
                head.site.tied = need.site
                heads.setdefault(id(spot), head)
    own = [n for n in needs if not (n.method.follows_ties and id(n.spot) in heads)]
    for need in needs:
        if need.method.name == "TOKEN_ADAPTER" and need not in own:
            raise TargetError(
                f"`{FIELD}`: {need.site.path} shares its weight with "
                f"{heads[id(need.spot)].site.tied}, and uses the tokens that are trained there. "
                "Name only that one."
            )
    return own + list(heads.values())


def _sharing(spot: Spot, spots: Sequence[Spot]) -> list[Spot]:
    weight = spot.layer._parameters.get("weight")
    return [
        other
        for other in spots
        if other is not spot
        and weight is not None
        and other.layer._parameters.get("weight") is weight
    ]


def _called(name: str, spots: Sequence[Spot]) -> list[Spot]:
    found = [s for s in spots if any(f".{p}".endswith(f".{name}") for p in s.paths)]
    if not found:
        known = {s.path.rpartition(".")[2] for s in spots if geometry_of(s.layer) is not None}
        hint = did_you_mean(name, known)
        raise TargetError(f"`{FIELD}`: no module is called `{name}`.{hint}")
    return found


def _input_embedding(model: nn.Module, spots: Sequence[Spot]) -> list[Spot]:
    """The model's input embedding; ``embed_tokens`` where the model does not tell."""
    words = getattr(model, "get_input_embeddings", lambda: None)()
    words = getattr(words, "base_layer", words)
    found = [spot for spot in spots if spot.layer is words]
    return found or _called("embed_tokens", spots)
