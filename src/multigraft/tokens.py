"""Sites of trained tokens: those that ride on another method's config, and heads that share them.

A head shares an embedding's rows when the two hold the same parameter: by identity, whatever the
model's config says about tying.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence

from torch import nn

from multigraft.bases import geometry_of
from multigraft.config import PeftConfig
from multigraft.errors import MultigraftWarning, TargetError, did_you_mean
from multigraft.methods import METHODS, Method
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


def with_ties(needs: Sequence[Need], spots: Sequence[Spot], ensure: bool = False) -> list[Need]:
    """The needs, and more of them where other modules share an embedding's weight.

    Args:
        ensure: whatever acts on one of them acts on all, and not only trained tokens.

    Raises:
        TargetError: a sharing module is asked for with rows of its own, or cannot be adapted.
    """
    following = [n for n in needs if n.method.follows_ties or (ensure and _may_follow(n))]
    following += _sources(following, spots) if ensure else []
    heads: dict[tuple[int, type[Method]], Need] = {}
    for need in following:
        if isinstance(need.site.layer, nn.Embedding):
            for spot in _sharing(need.spot, spots):
                (head,) = module_needs(spot, need.method)
                head.site.tied = need.site
                heads.setdefault((id(spot), need.method), head)
    own = [n for n in needs if n not in following or (id(n.spot), n.method) not in heads]
    for need in needs:
        if need.method.name == "TOKEN_ADAPTER" and need not in own:
            tied = heads[id(need.spot), need.method].site.tied
            raise TargetError(
                f"`{FIELD}`: {need.site.path} shares its weight with {tied}, and uses the tokens "
                "that are trained there. Name only that one."
            )
    return own + [n for n in following if n not in needs] + list(heads.values())


def warn_of_no_ties() -> None:
    """Say that `ensure_weight_tying` has nothing to act on."""
    warnings.warn(
        "`ensure_weight_tying` (=True): no module that is adapted or saved shares an embedding's "
        "weight, so there is nothing to tie. Name the embedding, or leave it out.",
        MultigraftWarning,
        stacklevel=4,
    )


def _may_follow(need: Need) -> bool:
    """Whether what acts there can be shared: the main method on a weight, or a copy."""
    is_copy = need.method.kind == "replace"
    return is_copy or (need.site.parameter is None and not need.method.rides)


def _sources(needs: Sequence[Need], spots: Sequence[Spot]) -> list[Need]:
    """The same at the embeddings whose weight these needs' modules share, where nobody asks."""
    found: dict[tuple[int, type[Method]], Need] = {}
    known = {(id(need.spot), need.method) for need in needs}
    for need in needs:
        for spot in _sharing(need.spot, spots):
            key = id(spot), need.method
            if isinstance(spot.layer, nn.Embedding) and key not in known:
                (source,) = module_needs(spot, need.method)
                found.setdefault(key, source)
    return list(found.values())


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
