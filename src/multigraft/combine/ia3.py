"""Weighted sums of IA3's vectors.

    l = Σ w_i l_i        l_i = 1 where an adapter does not act

Departs: PEFT counts an adapter as zero where it does not act, and so scales the layer down.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from multigraft.combine.config import common, prepared_like
from multigraft.combine.contract import RULES, Options
from multigraft.combine.request import WHERE, check_weights
from multigraft.combine.sites import Part, copies_at
from multigraft.combine.weighted import Sources, gather
from multigraft.errors import ConfigError, MergeError, UnsupportedError
from multigraft.finite import is_finite
from multigraft.keys import disk_names
from multigraft.merge import check_values
from multigraft.prepare import Prepared
from multigraft.tuner import Tuner


def are_all(tuner: Tuner, adapters: Sequence[str]) -> bool:
    """Whether these are known adapters, and all of them IA3."""
    if isinstance(adapters, str) or not adapters:
        return False
    known = [tuner.roster.configs.get(name) for name in adapters]
    return all(config is not None and str(config.peft_type) == "IA3" for config in known)


@torch.no_grad()
def add_weighted(
    tuner: Tuner, adapters: Sequence[str], weights: Sequence[float], name: str, rule: str
) -> None:
    """Graft the combination beside its sources; it starts inactive and frozen.

    Args:
        rule: ``"linear"``, or `add_weighted_adapter`'s default.

    Raises:
        AdapterNameError: the name is taken.
        ConfigError: it is another rule, or weights are not numbers.
        UnsupportedError: one scales a layer's input and another its output.
        MergeError: a source, or what comes out, is not finite.
    """
    tuner.roster.require_free(name)
    check_weights(adapters, weights)
    if rule not in ("linear", "svd"):
        raise ConfigError(
            f"{WHERE}: `combination_type` (={rule!r}) is one of LoRA's; IA3's vectors can only be "
            "added up. Leave it out."
        )
    sources = gather(tuner, adapters, weights)
    vectors = {key: parts for (key, method), parts in sources.items() if method == "IA3"}
    for parts in sources.values():
        for part in parts:
            check_values(part.graft, str(part.graft.site), "combining it", "added")
    for parts in vectors.values():
        _check_sides(parts)
    configs = [tuner.roster.configs[adapter] for adapter in adapters]
    sites = [parts[0].graft.site for parts in vectors.values()]
    prepared = prepared_like(tuner, name, _config(configs), configs, sites)
    given = dict(_values(prepared, sources, sum(weights)))
    held = [t for parts in vectors.values() for p in parts for t in p.graft.params.values()]
    in_float32 = any(t.dtype == torch.float32 for t in held)
    tuner.commit(prepared, given, in_float32, activate=False)


def _values(prepared: Prepared, sources: Sources, total: float) -> Iterator[tuple[str, Tensor]]:
    """The new adapter's tensors by their names on disk.

    Args:
        total: the sum of all sources' weights.
    """
    for need, method in prepared.parts:
        parts = sources.get(((need.site.path, need.site.parameter), need.method.name), [])
        if need.method.rides:
            values = copies_at(method, parts, RULES["linear"], Options())
        else:
            shape = method.tensors()["ia3_l"].shape
            values = {"ia3_l": _vector(parts, total, shape, str(need.site))}
        for name, spec in method.tensors().items():
            if not is_finite(values[name]):
                raise MergeError(
                    f"{need.site}: the weighted sum is NaN or infinite in `{name}`; nothing was "
                    "added. Use smaller weights."
                )
            yield disk_names(need.site, spec.on_disk or name, prepared.config), values[name]


def _vector(parts: Sequence[Part], total: float, shape: tuple[int, ...], where: str) -> Tensor:
    first = parts[0].graft.params["ia3_l"]
    if first.shape != shape:
        raise UnsupportedError(
            f"{where}: the union of `feedforward_modules` would scale the other side of this layer "
            "than its source does. Name the modules by their full paths."
        )
    vector = torch.full_like(first, total - sum(p.weight for p in parts), dtype=torch.float32)
    for part in parts:
        vector += part.weight * part.graft.params["ia3_l"].to(vector)
    return vector


def _config(configs: Sequence[Any]) -> Any:
    """The first config with the union of the feed-forward modules."""
    config = common(configs)
    named = [c.feedforward_modules for c in configs]
    if all(modules == named[0] for modules in named):
        return config
    if any(isinstance(modules, str) for modules in named):
        config.feedforward_modules = "|".join(f"({_expression(modules)})" for modules in named)
    else:
        config.feedforward_modules = sorted({name for modules in named for name in modules})
    return config


def _expression(modules: str | Sequence[str]) -> str:
    """A regular expression of whole paths that means these modules."""
    return modules if isinstance(modules, str) else "|".join(rf".*{name}" for name in modules)


def _check_sides(parts: Sequence[Part]) -> None:
    shapes = {part.graft.adapter: part.graft.params["ia3_l"].shape for part in parts}
    if len(set(shapes.values())) > 1:
        raise UnsupportedError(
            f"{WHERE}: {parts[0].graft.site} is a feed-forward module for some of {list(shapes)}, "
            "which scale its input, and not for others. Combine those that agree."
        )
