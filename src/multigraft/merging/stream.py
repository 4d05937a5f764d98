"""Adapters into a base layer by layer: values are in memory for the length of their own merge.

    mapped base ──clone──> merge() at these layers ──> the new file, in its place
         ▲                                     │
         └──────── the mapped bytes again <────┘

Layers that share a weight go together. What changes is decided by the same code as in memory,
`multigraft.merge.merge`; where that gives a layer a parameter of its own, the new files have it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from multigraft.effective import touched
from multigraft.errors import MergeError, MultigraftError, UnsupportedError
from multigraft.layer import AdaptedLayer
from multigraft.merge import merge, unmerge_layer
from multigraft.merging.base import MappedModel, held
from multigraft.merging.output import Output
from multigraft.roster import Roster
from multigraft.storage import slot_of
from multigraft.ties import to_part

OnLayer = Callable[[int, int], None]
"""Told how many layers are done, and of how many."""


@dataclass(frozen=True, eq=False)
class Change:
    """One tensor that merging writes: where it is in the model, and its keys in the new files."""

    layer: AdaptedLayer
    name: str
    keys: tuple[str, ...]

    def value(self) -> Tensor:
        """What the model holds there now."""
        slot = slot_of(self.layer.base_layer, self.name)
        value: Tensor = held(slot.layer, slot.name)
        return value.detach()


@dataclass(eq=False)
class Plan:
    """What will be written, before anything is.

    Args:
        groups: layers that are merged together, with what changes there.
        added: keys that the base's files lack, since they were tied, to the key that has their
            values.
    """

    groups: list[tuple[list[AdaptedLayer], list[Change]]] = field(default_factory=list)
    added: dict[str, str] = field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        """Every key that gets new values."""
        return [key for _, changes in self.groups for change in changes for key in change.keys]


def plan(base: MappedModel, roster: Roster, names: Sequence[str]) -> Plan:
    """What merging these adapters writes.

    Raises:
        UnsupportedError: one of them has no merged form, or changes how deep the model is.
    """
    merge(roster, names, layers=[])  # refuses what has no merged form at all
    if roster.replication is not None:
        raise UnsupportedError(
            "`layer_replication`: the merged model is deeper than the base, so its files are not "
            "the base's. Merge in memory with merge_and_unload(), and save that."
        )
    made = Plan()
    for layers in _groups(roster.touched(names)):
        made.groups.append((layers, list(_changes(base, roster, names, layers, made.added))))
    return made


def run(
    base: MappedModel,
    roster: Roster,
    names: Sequence[str],
    made: Plan,
    output: Output,
    on_layer: OnLayer | None = None,
) -> int:
    """Merge every group and write what comes out; the model is as before afterwards.

    Returns:
        How many tensors differ from the base's.
    """
    different = done = 0
    total = sum(len(layers) for layers, _ in made.groups)
    for layers, changes in made.groups:
        with _in_memory(changes) as own:
            try:
                merge(roster, names, safe=True, layers=layers)
            except ValueError as error:
                if isinstance(error, MultigraftError):
                    raise
                raise MergeError(f"{layers[0].path}: {error}") from error  # a narrow dtype's range
            for change, before in zip(changes, own, strict=True):
                value = change.value()
                different += not torch.equal(value, before)
                for key in change.keys:
                    output.put(key, value)
            for layer in layers:
                unmerge_layer(layer)
        base.weights.forget()
        done += len(layers)
        if on_layer is not None:
            on_layer(done, total)
    return different


@contextmanager
def _in_memory(changes: Sequence[Change]) -> Iterator[list[Tensor]]:
    """Tensors of their own in the place of the mapped ones that change; yields the mapped ones."""
    mapped: list[Tensor] = []
    tensors: dict[int, tuple[Tensor, Tensor]] = {}
    for change in changes:
        slot = slot_of(change.layer.base_layer, change.name)
        tensor = held(slot.layer, slot.name)
        before = tensors.setdefault(id(tensor), (tensor, tensor.data))[1]
        mapped.append(before)
    for tensor, before in tensors.values():
        tensor.data = before.clone()
    try:
        yield mapped
    finally:
        for tensor, before in tensors.values():
            tensor.data = before


def _groups(layers: Sequence[AdaptedLayer]) -> list[list[AdaptedLayer]]:
    """Layers that share a parameter, together."""
    group_of: dict[int, list[AdaptedLayer]] = {}
    found: dict[int, list[AdaptedLayer]] = {}
    for layer in layers:
        group = [layer]
        for parameter in layer.base_layer.parameters():
            other = group_of.get(id(parameter))
            if other is not None and other is not group:
                found.pop(id(other), None)
                group = [*other, *group]
        found[id(group)] = group
        for member in group:
            group_of |= {id(p): group for p in member.base_layer.parameters()}
    return list(found.values())


def _changes(
    base: MappedModel,
    roster: Roster,
    names: Sequence[str],
    layers: Sequence[AdaptedLayer],
    added: dict[str, str],
) -> Iterator[Change]:
    incoming = {id(x): [g for n in names for g in x.grafts.get(n, ())] for x in layers}
    parting = to_part(roster, incoming, layers)
    apart = {
        path
        for layer in layers
        for name in parting.get(id(layer), ())
        for path in _own_paths(base, layer, name)
    }
    for path in apart:
        added |= {p: base.names[p] for p in _same(base, path) if p not in base.stored}
    for layer in layers:
        for name in dict.fromkeys(n for graft in incoming[id(layer)] for n in touched(graft)):
            own = _own_paths(base, layer, name)
            paths = own if apart.intersection(own) else _same(base, own[0])
            keys = {_key(base, p, added): None for p in paths if p in own or p not in apart}
            yield Change(layer, name, tuple(keys))


def _own_paths(base: MappedModel, layer: AdaptedLayer, name: str) -> list[str]:
    """Every path to a tensor of this layer by the module that holds it."""
    slot = slot_of(layer.base_layer, name)
    found = base.paths_at.get((id(slot.layer), slot.name))
    if not found:
        raise UnsupportedError(
            f"{layer.path}: `{name}` is no tensor of the base's files. Merge in memory with "
            "merge_and_unload()."
        )
    return found


def _same(base: MappedModel, path: str) -> list[str]:
    """Every path to the same tensor, tied modules included."""
    return base.paths_of[id(held(*base.places[path]))]


def _key(base: MappedModel, path: str, added: dict[str, str]) -> str:
    return base.names[path] if path in base.stored or path not in added else path
