"""The config of a combined adapter: what its sources' configs have in common, and their union."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from multigraft.config import TargetedConfig
from multigraft.errors import TargetError, UnsupportedError
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


def prepared_like(
    tuner: Tuner, name: str, configs: Sequence[Any], sites: Sequence[Site], rank: int
) -> Prepared:
    """A LoRA that acts exactly where the sources do; their first says what they may differ in.

    Raises:
        UnsupportedError: the sources' options exclude each other.
        TargetError: no LoRA of this rank fits, or none means exactly these sites.
    """
    config = _common(configs, rank)
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
        if {(site.path, site.parameter) for site in prepared.main_sites} == wanted:
            return prepared
    raise error or TargetError(
        f"`target_modules`: no set of names means exactly the {len(wanted)} sites of the adapters "
        "to combine. Target their modules by names of their own."
    )


def _common(configs: Sequence[Any], rank: int) -> Any:
    """A copy of the first config with the union of what they train, and scaling 1."""
    config = configs[0].copy()
    config.r = config.lora_alpha = rank
    config.rank_pattern, config.alpha_pattern = {}, {}
    # The sources' scalings are in the factors, whatever they came from.
    config.use_rslora = False
    config.init_lora_weights = True
    config.use_dora = any(c.use_dora for c in configs)
    config.lora_bias = any(c.lora_bias for c in configs)
    config.modules_to_save = _union(c.modules_to_save for c in configs)
    config.target_parameters = _union(c.target_parameters for c in configs)
    config.bias = _one(configs, "bias", "none")
    config.trainable_token_indices = _one(configs, "trainable_token_indices", None)
    return config


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


def _one(configs: Sequence[TargetedConfig], field: str, neutral: Any) -> Any:
    """The value that all sources have which have any."""
    values = [v for c in configs if (v := getattr(c, field)) != neutral]
    if any(value != values[0] for value in values):
        raise UnsupportedError(
            f"adapters with different `{field}` ({', '.join(map(repr, values))}) cannot be "
            "combined: no adapter trains both. Combine those that agree."
        )
    return values[0] if values else neutral
