"""One LoRA out of several, weighted: checked first, then attached beside them, or nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from multigraft.combine.config import SiteKey, prepared_like
from multigraft.combine.request import WHERE, Request
from multigraft.combine.sites import Part, copies_at, pair_at
from multigraft.errors import MergeError, UnsupportedError
from multigraft.graft import Graft
from multigraft.keys import disk_names
from multigraft.merge import check_values
from multigraft.prepare import Prepared
from multigraft.site import Site
from multigraft.tuner import Tuner

Sources = dict[tuple[SiteKey, str], list[Part]]
"""What acts at each (site, method), in the order of the adapters."""


@torch.no_grad()
def add_weighted(tuner: Tuner, request: Request, name: str) -> None:
    """Graft the combination beside its sources; it starts inactive and frozen.

    Raises:
        AdapterNameError: the name is taken, or a source is unknown.
        UnsupportedError: the sources are of kinds, or have options, that cannot be combined.
        TargetError: their ranks do not suit the rule.
        StateError: a source holds no values.
        MergeError: a source, or what comes out, is not finite.
    """
    roster = tuner.roster
    roster.require(request.adapters)
    configs = [roster.configs[adapter] for adapter in request.adapters]
    _check_kinds(request, configs)
    sources = _gather(tuner, request)
    pairs = {key: parts for (key, method), parts in sources.items() if method == "LORA"}
    _check_sources(request, sources)
    sites: list[Site] = [parts[0].graft.site for parts in pairs.values()]
    prepared = prepared_like(tuner, name, configs, sites, _rank(request, pairs))
    given = dict(_values(prepared, sources, request))
    in_float32 = any(t.dtype == torch.float32 for parts in pairs.values() for t in _held(parts))
    tuner.commit(prepared, given, in_float32, activate=False)


def _values(prepared: Prepared, sources: Sources, request: Request) -> Iterator[tuple[str, Tensor]]:
    """The new adapter's tensors by their names on disk."""
    rule, options = request.rule, request.options
    for need, method in prepared.parts:
        site = need.site
        parts = sources.get(((site.path, site.parameter), need.method.name), [])
        if site.tied is not None:
            continue
        combine = copies_at if need.method.rides else pair_at
        try:
            values = combine(method, parts, rule, options)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise MergeError(
                f"{site}: what {list(request.adapters)} give by `{rule.name}` has no singular "
                f"value decomposition ({error}); nothing was added. Use smaller weights, or `cat`."
            ) from error
        for name, spec in method.tensors().items():
            if not spec.saved:
                continue
            if values[name].is_floating_point() and not torch.isfinite(values[name]).all():
                raise MergeError(
                    f"{site}: combining {list(request.adapters)} by `{rule.name}` gives NaN or "
                    f"infinity in `{name}`; nothing was added. Use smaller weights."
                )
            yield disk_names(site, spec.on_disk or name, prepared.config), values[name]


def _gather(tuner: Tuner, request: Request) -> Sources:
    sources: Sources = {}
    for adapter, weight in zip(request.adapters, request.weights, strict=True):
        for _, graft in tuner.roster.grafts(adapter):
            if graft.tied is None:
                key = (graft.site.path, graft.site.parameter), graft.method.name
                sources.setdefault(key, []).append(Part(graft, weight))
    return sources


def _rank(request: Request, pairs: dict[SiteKey, list[Part]]) -> int:
    """The new adapter's rank: the largest that any site needs."""
    ranks: dict[int, int] = {}
    for parts in pairs.values():
        for index, part in enumerate(_by_source(request, parts)):
            if part is not None:
                ranks[index] = max(ranks.get(index, 0), part.graft.method.rank)
    if request.rule.truncates:
        return request.rank or max(ranks.values())
    return sum(ranks.values()) if request.rule.on == "stack" else max(ranks.values())


def _by_source(request: Request, parts: list[Part]) -> list[Part | None]:
    """One entry per adapter of the request: what it does at this site."""
    left = list(parts)
    return [left.pop(0) if left and left[0].graft.adapter == a else None for a in request.adapters]


def _check_kinds(request: Request, configs: Sequence[Any]) -> None:
    for adapter, config in zip(request.adapters, configs, strict=True):
        if str(config.peft_type) != "LORA":
            raise UnsupportedError(
                f"{WHERE}: `{adapter}` is a {config.peft_type}; only LoRA adapters can be "
                "combined. Activate several adapters at once instead, with set_adapter([…])."
            )


def _check_sources(request: Request, sources: Sources) -> None:
    _check_saved(sources)
    for ((path, parameter), _), parts in sources.items():
        where = f"{path}.{parameter}" if parameter else path
        for part in parts:
            _check_graft(where, part.graft)
        ranks = {p.graft.adapter: p.graft.method.rank for p in parts}
        if request.rule.on == "factors" and len(set(ranks.values())) > 1:
            raise UnsupportedError(
                f"{WHERE}: `{request.rule.name}` adds up factors, which must have the same rank; "
                f"at {where} they are {ranks}. Use `cat` or a rule that ends in `svd`."
            )


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
    if variant is not None and not variant.combines:
        raise UnsupportedError(
            f"{WHERE}: `{graft.adapter}` uses LoRA's variant `{variant.name}`, whose effect is "
            "not that of a sum. Activate the adapters together instead, or merge this one."
        )
    check_values(graft, where, "combining it", "added")


def _held(parts: Sequence[Part]) -> Iterator[Tensor]:
    for part in parts:
        yield from part.graft.params.values()
