"""One LoRA out of several, weighted: checked first, then attached beside them, or nothing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from multigraft.combine.config import SiteKey, prepared_like
from multigraft.combine.contract import RULES, Options, Rule
from multigraft.combine.sites import Part, copies_at, pair_at
from multigraft.errors import (
    AdapterNameError,
    ConfigError,
    MergeError,
    MultigraftWarning,
    StateError,
    UnsupportedError,
)
from multigraft.graft import Graft
from multigraft.keys import disk_names
from multigraft.prepare import Prepared
from multigraft.site import Site
from multigraft.tuner import Tuner

DRIVERS = (None, "gesvd", "gesvdj", "gesvda")
WHERE = "add_weighted_adapter"


@dataclass(frozen=True)
class Request:
    """What is to be combined, and how: checked as far as no model is needed.

    Args:
        adapters: names of the sources; one may stand there twice.
        weights: one for each, of either sign.
        rule: how.
        rank: of the result, for rules that truncate; the largest of the sources' by default.
        options: of the rule.
    """

    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    rule: Rule
    rank: int | None
    options: Options

    @classmethod
    def of(
        cls,
        adapters: Sequence[str],
        weights: Sequence[float],
        combination_type: str,
        svd_rank: int | None,
        options: Options,
    ) -> Request:
        """Check the arguments of `add_weighted_adapter`.

        Raises:
            ConfigError: a value is outside what its argument allows.
            UnsupportedError: there is no such rule.
        """
        rule = RULES[combination_type]
        if isinstance(adapters, str) or not adapters:
            raise AdapterNameError(f"{WHERE}: `adapters` (={adapters!r}) must be a list of names.")
        _check_weights(adapters, weights)
        _check_options(rule, svd_rank, options)
        return cls(tuple(adapters), tuple(map(float, weights)), rule, svd_rank, options)


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
        values = combine(method, parts, rule, options)
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


def _check_graft(where: str, graft: Graft) -> None:
    variant = getattr(graft.method, "variant", None)
    if variant is not None and not variant.combines:
        raise UnsupportedError(
            f"{WHERE}: `{graft.adapter}` uses LoRA's variant `{variant.name}`, whose effect is "
            "not that of a sum. Activate the adapters together instead, or merge this one."
        )
    for name, tensor in graft.params.items():
        if tensor.is_meta:
            raise StateError(
                f"{where}: `{name}` of `{graft.adapter}` is on the meta device and holds no "
                "values; load the adapter before combining it."
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise MergeError(
                f"{where}: `{name}` of `{graft.adapter}` holds NaN or infinity; nothing was "
                "added. Retrain the adapter or load a good checkpoint."
            )


def _check_weights(adapters: Sequence[str], weights: Sequence[float]) -> None:
    if len(weights) != len(adapters):
        raise ConfigError(
            f"{WHERE}: `weights` ({len(weights)} given) must hold one number for each of the "
            f"{len(adapters)} `adapters`."
        )
    for weight in weights:
        if not math.isfinite(weight):
            raise ConfigError(f"{WHERE}: `weights` (={list(weights)}) must be finite numbers.")


def _check_options(rule: Rule, svd_rank: int | None, options: Options) -> None:
    given, density = options, options.density
    if rule.sparsify is not None and density is None:
        raise ConfigError(
            f"{WHERE}: `{rule.name}` needs `density`, the share of elements that stay: a number "
            "above 0 and at most 1."
        )
    if density is not None and not 0 < density <= 1:
        raise ConfigError(f"{WHERE}: `density` (={density}) must be above 0 and at most 1.")
    if given.majority not in ("total", "frequency"):
        raise ConfigError(
            f"{WHERE}: `majority_sign_method` (={given.majority!r}) must be 'total' or 'frequency'."
        )
    if svd_rank is not None and (not isinstance(svd_rank, int) or svd_rank < 1):
        raise ConfigError(f"{WHERE}: `svd_rank` (={svd_rank!r}) must be an integer of at least 1.")
    if given.clamp is not None and not 0 < given.clamp <= 1:
        raise ConfigError(
            f"{WHERE}: `svd_clamp` (={given.clamp}) is a quantile: above 0 and at most 1."
        )
    if given.driver not in DRIVERS:
        raise ConfigError(f"{WHERE}: `svd_driver` (={given.driver!r}) must be one of {DRIVERS}.")
    unused = [] if rule.truncates or svd_rank is None else ["svd_rank"]
    unused += [] if rule.truncates or given.clamp is None else ["svd_clamp"]
    unused += [] if rule.sparsify or density is None else ["density"]
    if unused:
        warnings.warn(
            f"{WHERE}: `{rule.name}` makes no use of {', '.join(f'`{n}`' for n in unused)}.",
            MultigraftWarning,
            stacklevel=5,
        )


def _held(parts: Sequence[Part]) -> Iterator[Tensor]:
    for part in parts:
        yield from part.graft.params.values()
