"""The structure of an adapted model, as data: one base, its sites, the adapters at each.

It is read from the module tree as it is, not through `multigraft.survey`, which refuses a model in
which the law is broken: here a breach is described like everything else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from multigraft.inspection.places import Part, Place, handles, places, root_of
from multigraft.layer import AdaptedLayer
from multigraft.storage import holder, parameter_counts, storage_of

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class SiteAdapter:
    """One adapter at one site, or at a group of sites that are alike.

    Args:
        method: the method's ``peft_type``; parts of one adapter that act side by side at a site,
            such as a low-rank pair and a bias, are joined by ``+``.
        rank: 0 for methods without one.
        parameters: how many numbers it holds there.
        dtype, device: of its tensors; several are joined by ``+``.
    """

    name: str
    method: str
    rank: int
    scaling: float
    is_active: bool
    is_merged: bool
    is_trainable: bool
    parameters: int
    dtype: str = ""
    device: str = ""


@dataclass(frozen=True)
class AdaptedSite:
    """An adapted layer: its base path, its base layer's kind, and its adapters in parallel.

    Args:
        parameters: how many numbers its base layer holds.
        dtype, device: of the base layer's tensors.
        inside: wrappers that lie inside this one, by their path in it.
        is_nested: whether it lies inside another adapter's wrapper, which the law forbids.
    """

    path: str
    kind: str
    storage: str
    shape: tuple[int, ...]
    adapters: tuple[SiteAdapter, ...]
    parameters: int = 0
    dtype: str = ""
    device: str = ""
    inside: tuple[AdaptedSite, ...] = ()
    is_nested: bool = False


@dataclass(frozen=True)
class SiteGroup:
    """Sites that differ in an index of their path alone.

    Args:
        pattern: the path, with the indices in braces: ``model.layers.{0..3}.mlp.up_proj``.
        adapters: as at each single site, their parameters summed over the group; likewise the
            base layers' ``parameters``.
    """

    pattern: str
    kind: str
    storage: str
    shape: tuple[int, ...]
    adapters: tuple[SiteAdapter, ...]
    sites: tuple[AdaptedSite, ...]
    parameters: int = 0
    dtype: str = ""
    device: str = ""
    inside: tuple[SiteGroup, ...] = ()
    is_nested: bool = False


@dataclass(frozen=True, repr=False)
class Structure:
    """A model and its adapters; prints as a tree.

    Args:
        base: class of the base model.
        base_parameters: how many numbers the base holds, adapters not counted.
        adapters: names, in order of addition.
        sites: adapted layers, in the model's order.
        nested: paths of adapted layers that lie inside another one; the law says: none.
        contexts: adapters that change what the model is given; they act at no site.
        base_trainable: how many of the base's parameters require gradients.
    """

    base: str
    base_parameters: int
    adapters: tuple[str, ...]
    sites: tuple[AdaptedSite, ...]
    nested: tuple[str, ...]
    contexts: tuple[SiteAdapter, ...] = ()
    base_trainable: int = 0

    @property
    def is_flat(self) -> bool:
        """Whether no adapted layer lies inside another one."""
        return not self.nested

    @property
    def groups(self) -> tuple[SiteGroup, ...]:
        """The sites with repeats folded: alike in everything but one index of the path."""
        found: dict[tuple, list[AdaptedSite]] = {}
        for site in self.sites:
            key = (_INDEX.sub(r"\1*", site.path), replace(site, path=""))
            found.setdefault(key, []).append(site)
        return tuple(_group(sites) for sites in found.values())

    def __str__(self) -> str:
        from multigraft.inspection.table import text

        return text(self)

    __repr__ = __str__

    def __rich__(self) -> RenderableType:
        """What rich prints: the same table, with its styles."""
        from multigraft.inspection.table import rich_table

        return rich_table(self)

    def show(self) -> None:
        """Print the tree: with rich where that is installed, else as plain text."""
        from multigraft.inspection.table import show

        show(self)

    def parameters_of(self, adapter: str) -> int:
        """How many numbers one adapter holds over all sites, and in the context."""
        places = [site.adapters for site in self.sites] + [self.contexts]
        return sum(a.parameters for place in places for a in place if a.name == adapter)


def inspect(model: nn.Module) -> Structure:
    """The structure of a model with adapters, whoever put them there.

    Args:
        model: a `PeftModel`, a model that was adapted in place, or the same of PEFT's.
    """
    base, _ = root_of(model)
    _, handle = next(handles(model))
    found = places(model)
    own = {id(t) for p in found for q in p.all() for part in q.parts for t in part.tensors.values()}
    roster = next((p.layer.roster for p in found if isinstance(p.layer, AdaptedLayer)), None)
    roster = roster or getattr(handle, "roster", None)
    configs: Any = roster.configs if roster else getattr(handle, "peft_config", None)
    configs = configs or getattr(base, "peft_config", None)
    names = configs if isinstance(configs, dict) else [a.name for p in found for a in p.parts]
    counts = [(p, n) for p, n in parameter_counts(base) if id(p) not in own]
    return Structure(
        base=type(base).__name__,
        base_parameters=sum(n for _, n in counts),
        adapters=tuple(dict.fromkeys(names)),
        sites=tuple(_site(place, place.site) for place in found),
        nested=tuple(p.path for place in found for p in place.all() if p.is_nested),
        contexts=tuple(_contexts(handle, roster)),
        base_trainable=sum(n for p, n in counts if p.requires_grad),
    )


_INDEX = re.compile(r"(^|\.)\d+(?=\.|$)")


def _site(place: Place, path: str) -> AdaptedSite:
    base = place.base
    storage = place.layer.storage if isinstance(place.layer, AdaptedLayer) else storage_of(base)
    has_weight = holder(base) is not None
    tensors = place.base_parameters
    own = set(map(id, tensors))
    return AdaptedSite(
        path=path,
        kind=type(base).__name__,
        storage=storage.name,
        shape=storage.shape(base) if has_weight else (),
        adapters=tuple(_adapter(part) for part in place.parts),
        parameters=sum(n for p, n in parameter_counts(base) if id(p) in own),
        dtype=_dtypes(tensors),
        device=_devices(tensors),
        inside=tuple(_site(p, p.within) for p in place.inside),
        is_nested=place.is_nested,
    )


def _adapter(part: Part) -> SiteAdapter:
    tensors = part.tensors.values()
    return SiteAdapter(
        name=part.name,
        method=part.method,
        rank=part.rank,
        scaling=part.scaling,
        is_active=part.is_active,
        is_merged=part.is_merged,
        is_trainable=part.trains,
        parameters=sum(t.numel() for t in tensors),
        dtype=_dtypes(tensors),
        device=_devices(tensors),
    )


def _contexts(model: nn.Module, roster: Any) -> Iterator[SiteAdapter]:
    """Adapters at no site: our contexts, or what PEFT holds at the handle as prompt encoders."""
    if roster is not None:
        acting = roster.acting()
        held = [(name, roster.context_of(name)) for name in roster.configs]
        found = [(name, context.name, context) for name, context in held if context is not None]
    else:
        encoders = model._modules.get("prompt_encoder")
        acting = getattr(model, "active_adapters", [])
        kinds = getattr(model, "peft_config", {})
        found = [
            (name, str(getattr(kinds[name].peft_type, "value", kinds[name].peft_type)), encoder)
            for name, encoder in (encoders.named_children() if encoders is not None else ())
            if name in kinds
        ]
    for name, method, context in found:
        own = list(context.parameters())
        yield _adapter(
            Part(
                name=name,
                method=method,
                rank=0,
                scaling=1.0,
                is_active=name in acting,
                is_merged=False,
                tensors={str(number): p for number, p in enumerate(own)},
            )
        )


def _dtypes(tensors: Iterable[Tensor]) -> str:
    return "+".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors}))


def _devices(tensors: Iterable[Tensor]) -> str:
    return "+".join(sorted({str(t.device) for t in tensors}))


def _group(sites: Sequence[AdaptedSite]) -> SiteGroup:
    first, times = sites[0], len(sites)
    return SiteGroup(
        pattern=fold([site.path for site in sites]),
        kind=first.kind,
        storage=first.storage,
        shape=first.shape,
        adapters=tuple(replace(a, parameters=a.parameters * times) for a in first.adapters),
        sites=tuple(sites),
        parameters=first.parameters * times,
        dtype=first.dtype,
        device=first.device,
        inside=tuple(
            replace(_group([inner] * times), pattern=inner.path) for inner in first.inside
        ),
        is_nested=first.is_nested,
    )


def fold(paths: Sequence[str]) -> str:
    """Paths that differ in indices alone as one pattern: ``{0..3}`` for a run, ``{0,2,5..9}``."""
    columns = zip(*(path.split(".") for path in paths), strict=True)
    parts = []
    for column in columns:
        values = list(dict.fromkeys(column))
        parts.append(values[0] if len(values) == 1 else _indices([int(v) for v in values]))
    return ".".join(parts)


def _indices(values: list[int]) -> str:
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    is_one = len(runs) == 1
    return "{" + ",".join(part for run in runs for part in _run(run, is_one)) + "}"


def _run(values: list[int], is_all: bool) -> list[str]:
    """Neighbours as ``3..7``; a pair among others is written out."""
    if len(values) > 2 or (is_all and len(values) == 2):
        return [f"{values[0]}..{values[-1]}"]
    return list(map(str, values))
