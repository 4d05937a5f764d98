"""The structure of an adapted model, as data: one base, its sites, the adapters at each.

It is read from the module tree as it is, not through `multigraft.survey`, which refuses a model in
which the law is broken: here a breach is described like everything else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from multigraft.graft import Graft
from multigraft.layer import AdaptedLayer
from multigraft.roster import Roster
from multigraft.storage import holder, parameter_counts


@dataclass(frozen=True)
class SiteAdapter:
    """One adapter at one site, or at a group of sites that are alike.

    Args:
        method: the method's ``peft_type``; parts of one adapter that act side by side at a site,
            such as a low-rank pair and a bias, are joined by ``+``.
        rank: 0 for methods without one.
        parameters: how many numbers it holds there.
    """

    name: str
    method: str
    rank: int
    scaling: float
    is_active: bool
    is_merged: bool
    is_trainable: bool
    parameters: int


@dataclass(frozen=True)
class AdaptedSite:
    """An adapted layer: its base path, its base layer's kind, and its adapters in parallel."""

    path: str
    kind: str
    storage: str
    shape: tuple[int, ...]
    adapters: tuple[SiteAdapter, ...]


@dataclass(frozen=True)
class SiteGroup:
    """Sites that differ in an index of their path alone.

    Args:
        pattern: the path, with the indices in braces: ``model.layers.{0..3}.mlp.up_proj``.
        adapters: as at each single site, their parameters summed over the group.
    """

    pattern: str
    kind: str
    storage: str
    shape: tuple[int, ...]
    adapters: tuple[SiteAdapter, ...]
    sites: tuple[AdaptedSite, ...]


@dataclass(frozen=True)
class Structure:
    """A model and its adapters.

    Args:
        base: class of the base model.
        base_parameters: how many numbers the base holds, adapters not counted.
        adapters: names, in order of addition.
        sites: adapted layers, in the model's order.
        nested: paths of adapted layers that lie inside another one; the law says: none.
        contexts: adapters that change what the model is given; they act at no site.
    """

    base: str
    base_parameters: int
    adapters: tuple[str, ...]
    sites: tuple[AdaptedSite, ...]
    nested: tuple[str, ...]
    contexts: tuple[SiteAdapter, ...] = ()

    @property
    def is_flat(self) -> bool:
        """Whether no adapted layer lies inside another one."""
        return not self.nested

    @property
    def groups(self) -> tuple[SiteGroup, ...]:
        """The sites with repeats folded: alike in everything but one index of the path."""
        found: dict[tuple, list[AdaptedSite]] = {}
        for site in self.sites:
            key = (
                _INDEX.sub(r"\1*", site.path),
                site.kind,
                site.storage,
                site.shape,
                site.adapters,
            )
            found.setdefault(key, []).append(site)
        return tuple(_group(sites) for sites in found.values())

    def parameters_of(self, adapter: str) -> int:
        """How many numbers one adapter holds over all sites, and in the context."""
        places = [site.adapters for site in self.sites] + [self.contexts]
        return sum(a.parameters for place in places for a in place if a.name == adapter)


def describe(model: nn.Module) -> Structure:
    """The structure of a `PeftModel`, or of a model adapted in place."""
    base_of = getattr(model, "get_base_model", None)
    base = base_of() if callable(base_of) else model
    layers = list(_outermost(base, set()))
    own = {id(p) for layer in layers for g in layer.all_grafts() for p in _tensors(g)}
    roster = layers[0].roster if layers else getattr(model, "roster", None)
    return Structure(
        base=type(base).__name__,
        base_parameters=sum(n for p, n in parameter_counts(base) if id(p) not in own),
        adapters=tuple(roster.configs) if roster else (),
        sites=tuple(_site(layer) for layer in layers),
        nested=tuple(nested_layers(model)),
        contexts=tuple(_contexts(roster)) if roster else (),
    )


def nested_layers(model: nn.Module) -> Iterator[str]:
    """Module paths of adapted layers inside adapted layers, each as often as it is reached."""
    for path, layer in model.named_modules():
        if isinstance(layer, AdaptedLayer):
            for below, module in layer.named_modules(prefix=path):
                if module is not layer and isinstance(module, AdaptedLayer):
                    yield below


def _outermost(module: nn.Module, seen: set[int]) -> Iterator[AdaptedLayer]:
    """Adapted layers that lie in no other one, each once, in the model's order."""
    if id(module) in seen:
        return
    seen.add(id(module))
    if isinstance(module, AdaptedLayer):
        yield module
        return
    for child in module.children():
        yield from _outermost(child, seen)


_INDEX = re.compile(r"(^|\.)\d+(?=\.|$)")


def _site(layer: AdaptedLayer) -> AdaptedSite:
    has_weight = holder(layer.base_layer) is not None
    return AdaptedSite(
        path=layer.path,
        kind=type(layer.base_layer).__name__,
        storage=layer.storage.name,
        shape=layer.storage.shape(layer.base_layer) if has_weight else (),
        adapters=tuple(_adapter(layer, name, grafts) for name, grafts in layer.grafts.items()),
    )


def _adapter(layer: AdaptedLayer, name: str, grafts: Sequence[Graft]) -> SiteAdapter:
    main = grafts[0].method
    return SiteAdapter(
        name=name,
        method="+".join(dict.fromkeys(g.method.name for g in grafts)),
        rank=main.rank,
        scaling=main.scaling,
        is_active=layer.roster.enabled and name in layer.roster.active,
        is_merged=name in layer.merged_adapters,
        is_trainable=any(p.requires_grad for g in grafts for p in g.parameters()),
        parameters=sum(t.numel() for g in grafts for t in _tensors(g)),
    )


def _contexts(roster: Roster) -> Iterator[SiteAdapter]:
    for name in roster.configs:
        context = roster.context_of(name)
        if context is not None:
            own = list(context.parameters())
            yield SiteAdapter(
                name=name,
                method=context.name,
                rank=0,
                scaling=1.0,
                is_active=roster.enabled and name in roster.active,
                is_merged=False,
                is_trainable=any(p.requires_grad for p in own),
                parameters=sum(p.numel() for p in own),
            )


def _tensors(graft: Graft) -> list[nn.Parameter]:
    return [t for t in graft.params.values() if isinstance(t, nn.Parameter)]


def _group(sites: Sequence[AdaptedSite]) -> SiteGroup:
    first = sites[0]
    adapters = [
        SiteAdapter(**{**vars(a), "parameters": a.parameters * len(sites)}) for a in first.adapters
    ]
    pattern = _fold([site.path for site in sites])
    return SiteGroup(pattern, first.kind, first.storage, first.shape, tuple(adapters), tuple(sites))


def _fold(paths: Sequence[str]) -> str:
    """Paths that differ in indices alone as one pattern: ``{0..3}`` for a run, ``{0,2}`` else."""
    columns = zip(*(path.split(".") for path in paths), strict=True)
    parts = []
    for column in columns:
        values = list(dict.fromkeys(column))
        parts.append(values[0] if len(values) == 1 else _indices([int(v) for v in values]))
    return ".".join(parts)


def _indices(values: list[int]) -> str:
    if values == list(range(values[0], values[0] + len(values))):
        return f"{{{values[0]}..{values[-1]}}}"
    return f"{{{','.join(map(str, values))}}}"
