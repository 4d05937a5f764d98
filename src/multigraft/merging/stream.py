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
from multigraft.merging.layout import Built
from multigraft.merging.output import Output
from multigraft.roster import Roster
from multigraft.storage import slot_of
from multigraft.ties import to_part

OnLayer = Callable[[int, int], None]
"""Told how many layers are done, and of how many."""


@dataclass(frozen=True, eq=False)
class Change:
    """One tensor that merging writes: where it is in the model, and its keys in the new files.

    Args:
        path: in the model.
        built: what it is made of, where that is more than one tensor.
    """

    layer: AdaptedLayer
    name: str
    path: str
    keys: tuple[str, ...]
    built: Built | None = None

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
    for layers in _groups(base, roster.touched(names)):
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
        with _in_memory(base, changes):
            try:
                merge(roster, names, safe=True, layers=layers)
            except ValueError as error:
                if isinstance(error, MultigraftError):
                    raise
                raise MergeError(f"{layers[0].path}: {error}") from error  # a narrow dtype's range
            for key, value in _written(base, changes):
                source = made.added.get(key, key)
                different += not torch.equal(value, base.weights[source])
                output.put(key, value)
            for layer in layers:
                unmerge_layer(layer)
        base.weights.forget()
        done += len(layers)
        if on_layer is not None:
            on_layer(done, total)
    return different


def resized_values(base: MappedModel, made: Plan) -> dict[str, Tensor]:
    """Values of resized embeddings by key, of those that nothing is merged into."""
    changed = set(made.keys)
    found = {_key(base, path, made.added): held(*base.places[path]) for path in base.resized}
    return {key: value.detach() for key, value in found.items() if key not in changed}


def _written(base: MappedModel, changes: Sequence[Change]) -> Iterator[tuple[str, Tensor]]:
    """What goes into the files, by key, once the model has merged values."""
    built: dict[int, tuple[Built, dict[str, Tensor]]] = {}
    for change in changes:
        if change.built is None:
            yield from ((key, change.value()) for key in change.keys)
        else:
            values = built.setdefault(id(change.built), (change.built, {}))[1]
            values[change.path] = change.value()
    for whole, values in built.values():
        for path in whole.shapes.keys() - values.keys():
            values[path] = base.values_of(path)
        yield from whole.undo(values).items()


@contextmanager
def _in_memory(base: MappedModel, changes: Sequence[Change]) -> Iterator[None]:
    """Tensors of their own in the place of the mapped ones that change."""
    tensors: dict[int, tuple[Tensor, Tensor]] = {}
    try:
        for change in changes:
            slot = slot_of(change.layer.base_layer, change.name)
            tensor = held(slot.layer, slot.name)
            if id(tensor) not in tensors:
                tensors[id(tensor)] = tensor, tensor.data
                made = change.built is not None
                tensor.data = base.values_of(change.path) if made else tensor.data.clone()
        yield
    finally:
        for tensor, before in tensors.values():
            tensor.data = before


def _groups(base: MappedModel, layers: Sequence[AdaptedLayer]) -> list[list[AdaptedLayer]]:
    """Layers that share a parameter, or tensors that theirs are made of, together."""
    group_of: dict[int, list[AdaptedLayer]] = {}
    found: dict[int, list[AdaptedLayer]] = {}
    for layer in layers:
        group = [layer]
        for mark in _marks(base, layer):
            other = group_of.get(mark)
            if other is not None and other is not group:
                found.pop(id(other), None)
                group = [*other, *group]
                group_of |= dict.fromkeys((m for x in other for m in _marks(base, x)), group)
        found[id(group)] = group
        group_of |= dict.fromkeys(_marks(base, layer), group)
    return list(found.values())


def _marks(base: MappedModel, layer: AdaptedLayer) -> list[int]:
    """Identities of what a layer's tensors are, or are made of."""
    found = [id(parameter) for parameter in layer.base_layer.parameters()]
    paths = (path for mark in found for path in base.paths_of.get(mark, ()))
    return found + [id(base.built[path]) for path in paths if path in base.built]


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
            if own[0] in base.built:
                whole = base.built[own[0]]
                yield Change(layer, name, own[0], whole.keys, whole)
                continue
            paths = own if apart.intersection(own) else _same(base, own[0])
            keys = {_key(base, p, added): None for p in paths if p in own or p not in apart}
            yield Change(layer, name, own[0], tuple(keys))


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
