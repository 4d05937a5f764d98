"""One LoRA out of several, weighted: checked first, then attached beside them, or nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from multigraft.combine.config import SiteKey, lora_like, prepared_like
from multigraft.combine.ranks import Rank, Residual
from multigraft.combine.request import WHERE, Request
from multigraft.combine.sites import Part, combined, copies_at, pair_at, rank_of, width
from multigraft.combine.svd import Cut
from multigraft.errors import MergeError, UnsupportedError
from multigraft.finite import is_finite
from multigraft.graft import Graft
from multigraft.keys import disk_names
from multigraft.merge import check_values
from multigraft.prepare import Prepared
from multigraft.survey import survey
from multigraft.tuner import Tuner

Sources = dict[tuple[SiteKey, str], list[Part]]
"""What acts at each (site, method), in the order of the adapters."""


Pairs = dict[SiteKey, Cut]
"""The combined pair of each site."""


@torch.no_grad()
def add_weighted(
    tuner: Tuner, request: Request, name: str, *, is_fitted: bool = False
) -> list[Residual]:
    """Graft the combination beside its sources; it starts inactive and frozen.

    Args:
        is_fitted: each site gets the rank that it needs rather than the largest that one needs;
            so it is with a share of the energy anyway.

    Returns:
        What each site lost.

    Raises:
        AdapterNameError: the name is taken, or a source is unknown.
        UnsupportedError: the sources are of kinds, or have options, that cannot be combined.
        TargetError: their ranks do not suit the rule.
        StateError: a source holds no values.
        MergeError: a source, or what comes out, is not finite.
    """
    roster = tuner.roster
    roster.require_free(name)
    roster.require(request.adapters)
    configs = [roster.configs[adapter] for adapter in request.adapters]
    _check_kinds(request, configs)
    _check_invocations(request, configs)
    sources = gather(tuner, request.adapters, request.weights)
    loras = _loras(tuner, sources)
    _check_sources(request, sources)
    rank = _rank(request, loras)
    pairs = {key: _pair(parts, request, rank) for key, parts in loras.items()}
    each = is_fitted or isinstance(rank, float)
    sites = {key: parts[0].graft.site for key, parts in loras.items()}
    ranks = {s: rank_of(s, pairs[key].a) if each else int(rank) for key, s in sites.items()}
    config = lora_like(configs, ranks)
    prepared = prepared_like(tuner, name, config, configs, list(ranks))
    given = dict(_values(prepared, sources, pairs, request))
    in_float32 = any(t.dtype == torch.float32 for parts in loras.values() for t in _held(parts))
    tuner.commit(prepared, given, in_float32, activate=False)
    return [Residual(str(s), ranks[s], pairs[key].error) for key, s in sites.items()]


def _pair(parts: Sequence[Part], request: Request, rank: Rank) -> Cut:
    try:
        return combined(parts, request.rule, rank, request.options)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise MergeError(
            f"{parts[0].graft.site}: what {list(request.adapters)} give by `{request.rule.name}` "
            f"has no singular value decomposition ({error}); nothing was added. Use smaller "
            "weights, or `cat`."
        ) from error


def _values(
    prepared: Prepared, sources: Sources, pairs: Pairs, request: Request
) -> Iterator[tuple[str, Tensor]]:
    """The new adapter's tensors by their names on disk."""
    rule, options = request.rule, request.options
    for need, method in prepared.parts:
        site = need.site
        key = site.path, site.parameter
        parts = sources.get((key, need.method.name), [])
        if site.tied is not None:
            continue
        if need.method.rides:
            values = copies_at(method, parts, rule, options)
        else:
            values = pair_at(method, pairs[key], parts, rule, options)
        for name, spec in method.tensors().items():
            if not spec.saved:
                continue
            if not is_finite(values[name]):
                raise MergeError(
                    f"{site}: combining {list(request.adapters)} by `{rule.name}` gives NaN or "
                    f"infinity in `{name}`; nothing was added. Use smaller weights."
                )
            yield disk_names(site, spec.on_disk or name, prepared.config), values[name]


def gather(tuner: Tuner, adapters: Sequence[str], weights: Sequence[float]) -> Sources:
    """What these adapters do at each site that has tensors of its own."""
    sources: Sources = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for _, graft in tuner.roster.grafts(adapter):
            if graft.tied is None:
                key = (graft.site.path, graft.site.parameter), graft.method.name
                sources.setdefault(key, []).append(Part(graft, weight))
    return sources


def _loras(tuner: Tuner, sources: Sources) -> dict[SiteKey, list[Part]]:
    """The LoRAs at each site, in the model's order: what is drawn is drawn in it, as in PEFT."""
    place = {path: n for n, spot in enumerate(survey(tuner.model)) for path in spot.paths}
    loras = [(key, parts) for (key, method), parts in sources.items() if method == "LORA"]
    return dict(sorted(loras, key=lambda item: place.get(item[0][0], 0)))


def _rank(request: Request, loras: dict[SiteKey, list[Part]]) -> Rank:
    """The new adapter's rank: the largest that any site needs, unless the request says it."""
    if request.rule.truncates and request.rank:
        return request.rank
    ranks: dict[int, int] = {}
    for parts in loras.values():
        for index, part in enumerate(_by_source(request, parts)):
            if part is not None:
                ranks[index] = max(ranks.get(index, 0), width(part.graft))
    adds_up = request.rule.on == "stack" and not request.rule.truncates
    return sum(ranks.values()) if adds_up else max(ranks.values())


def _by_source(request: Request, parts: list[Part]) -> list[Part | None]:
    """One entry per adapter of the request: what it does at this site."""
    left = list(parts)
    return [left.pop(0) if left and left[0].graft.adapter == a else None for a in request.adapters]


def _check_kinds(request: Request, configs: Sequence[Any]) -> None:
    for adapter, config in zip(request.adapters, configs, strict=True):
        if str(config.peft_type) != "LORA":
            raise UnsupportedError(
                f"{WHERE}: `{adapter}` is a {config.peft_type}; only LoRA adapters can be "
                "combined, or IA3 among themselves. Activate several adapters at once instead, "
                "with set_adapter([…])."
            )


def _check_invocations(request: Request, configs: Sequence[Any]) -> None:
    """Refuse adapters that act on different tokens: no one adapter acts on both."""
    found = [getattr(config, "alora_invocation_tokens", None) for config in configs]
    if any(tokens != found[0] for tokens in found):
        named = ", ".join(f"`{a}` {t}" for a, t in zip(request.adapters, found, strict=True))
        raise UnsupportedError(
            f"{WHERE}: the adapters act from different tokens of a row on (`alora_invocation_"
            f"tokens`: {named}). Activate them together instead, with set_adapter([…])."
        )


def _check_sources(request: Request, sources: Sources) -> None:
    _check_saved(sources)
    for ((path, parameter), _), parts in sources.items():
        where = f"{path}.{parameter}" if parameter else path
        for part in parts:
            _check_graft(where, part.graft)
        ranks = _ranks(parts) if request.rule.on == "factors" else {}
        if len(set(ranks.values())) > 1:
            raise UnsupportedError(
                f"{WHERE}: `{request.rule.name}` adds up factors, which must have the same rank; "
                f"at {where} they are {ranks}. Use `cat` or a rule that ends in `svd`."
            )


def _ranks(parts: Sequence[Part]) -> dict[str, int]:
    return {p.graft.adapter: width(p.graft) for p in parts if p.graft.method.name == "LORA"}


def _check_saved(sources: Sources) -> None:
    """Refuse a layer that one source adapts inside a module of which another saves a copy."""
    saved = {path: p[0].graft for ((path, _), name), p in sources.items() if name == "SAVED_MODULE"}
    for ((path, _), name), parts in sources.items() if saved else ():
        around = [p for p in saved if name == "LORA" and f"{path}.".startswith(f"{p}.")]
        if around:
            raise UnsupportedError(
                f"{WHERE}: `{parts[0].graft.adapter}` adapts {path}, of which "
                f"`{saved[around[0]].adapter}` saves a copy of its own: one adapter cannot do "
                "both. Merge one of them into the base first, or activate both together."
            )


def _check_graft(where: str, graft: Graft) -> None:
    variant = getattr(graft.method, "variant", None)
    if variant is not None and not (variant.combines or variant.is_pair):
        raise UnsupportedError(
            f"{WHERE}: `{graft.adapter}` uses LoRA's variant `{variant.name}`, whose effect is "
            "not that of a sum. Activate the adapters together instead, or merge this one."
        )
    check_values(graft, where, "combining it", "added")


def _held(parts: Sequence[Part]) -> Iterator[Tensor]:
    for part in parts:
        yield from part.graft.params.values()
