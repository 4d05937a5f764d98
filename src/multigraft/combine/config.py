"""The config of a combined adapter: what its sources' configs have in common, and their union."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from multigraft.combine.ranks import patterns
from multigraft.config import PeftConfig, TargetedConfig
from multigraft.errors import TargetError, UnsupportedError
from multigraft.methods.lora import LoraConfig
from multigraft.prepare import Prepared
from multigraft.site import Site
from multigraft.sites import minimal_names
from multigraft.survey import survey
from multigraft.tuner import Tuner

SiteKey = tuple[str, str | None]
"""(path, parameter)."""
FILTERS: Mapping[str, Any] = {
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
}
KEPT = (
    *(field.name for field in dataclasses.fields(TargetedConfig) if field.name != "peft_type"),
    "lora_dropout",
    "fan_in_fan_out",
    "layer_replication",
    "ensure_weight_tying",
    "megatron_config",
    "megatron_core",
)
"""Fields that mean the same whatever the update is."""


def lora_like(configs: Sequence[Any], ranks: Mapping[Site, int]) -> Any:
    """A LoRA config of scaling 1 with the union of what these train, for `prepared_like`.

    Args:
        ranks: at each site.

    Raises:
        UnsupportedError: the sources' options exclude each other.
    """
    config = plain(configs[0])
    config.modules_to_save = _union(c.modules_to_save for c in configs)
    targets = {site.target: rank for site, rank in ranks.items()}
    config.r, config.rank_pattern = patterns(targets, targets)
    config.lora_alpha, config.alpha_pattern = config.r, dict(config.rank_pattern)
    config.use_dora = any(getattr(c, "use_dora", False) for c in configs)
    config.alora_invocation_tokens = getattr(configs[0], "alora_invocation_tokens", None)
    config.lora_bias = any(getattr(c, "lora_bias", False) for c in configs)
    config.target_parameters = _union(getattr(c, "target_parameters", None) for c in configs)
    config.bias = _one(configs, "bias", "none")
    config.trainable_token_indices = _one(configs, "trainable_token_indices", None)
    return config


def plain(config: PeftConfig) -> Any:
    """A LoRA config with what is not LoRA's own of any method's config.

    Scalings are in the factors, whatever they came from, and so is where factors began.
    """
    lora, given = LoraConfig(), config.copy()
    for name in KEPT:
        if hasattr(given, name):
            setattr(lora, name, getattr(given, name))
    return lora


def common(configs: Sequence[Any]) -> Any:
    """A copy of the first config with the modules that any of them saves."""
    config = configs[0].copy()
    config.modules_to_save = _union(c.modules_to_save for c in configs)
    return config


def prepared_like(
    tuner: Tuner, name: str, config: Any, configs: Sequence[Any], sites: Sequence[Site]
) -> Prepared:
    """An adapter of this config that acts exactly where the sources do.

    Args:
        config: all but the targets.
        configs: the sources'; the first says what they may differ in.
        sites: where they act.

    Raises:
        TargetError: no adapter of this config fits, or none means exactly these sites.
    """
    wanted = {(site.path, site.parameter) for site in sites}
    error: TargetError | None = None
    for targets in _candidates(tuner, configs, sites):
        candidate = config.copy()
        for field, value in targets.items():
            setattr(candidate, field, value)
        try:
            prepared = tuner.prepare(name, candidate)
        except TargetError as refused:
            error = refused
            continue
        own = [site for site in prepared.main_sites if site.tied is None]
        if {(site.path, site.parameter) for site in own} == wanted:
            return prepared
    raise error or TargetError(
        f"`target_modules`: no set of names means exactly the {len(wanted)} sites of the adapters "
        "to combine. Target their modules by names of their own."
    )


def _candidates(
    tuner: Tuner, configs: Sequence[Any], sites: Sequence[Site]
) -> Iterator[dict[str, Any]]:
    """Ways to name the targets: as PEFT unites them, then by the modules themselves."""
    named = [c.target_modules for c in configs]
    same = all(getattr(c, f) == getattr(configs[0], f) for c in configs for f in FILTERS)
    if same and all(t == named[0] for t in named):
        yield {}
    elif same and all(isinstance(t, str) for t in named):
        yield {"target_modules": "|".join(f"({t})" for t in dict.fromkeys(named))}
    elif same and not any(isinstance(t, str) for t in named):
        yield {"target_modules": sorted({name for t in named for name in t or ()})}
    spots = survey(tuner.model)
    modules = {s.target for s in sites if s.parameter is None or s.target != str(s)}
    chosen = [spot for spot in spots if modules.intersection(spot.paths)]
    yield {**FILTERS, "target_modules": minimal_names(chosen, spots) if chosen else []}


def _union(lists: Any) -> list[str] | None:
    return list(dict.fromkeys(name for each in lists for name in each or ())) or None


def _one(configs: Sequence[PeftConfig], field: str, neutral: Any) -> Any:
    """The value that all sources have which have any."""
    values = [v for c in configs if (v := getattr(c, field, neutral)) != neutral]
    if any(value != values[0] for value in values):
        raise UnsupportedError(
            f"adapters with different `{field}` ({', '.join(map(repr, values))}) cannot be "
            "combined: no adapter trains both. Combine those that agree."
        )
    return values[0] if values else neutral
