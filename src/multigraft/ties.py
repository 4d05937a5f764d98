"""Parameters that several modules share, while adapters are merged into one of them.

A head that shares its embedding's weight must not see what is merged into the embedding, unless
the adapter acts on both alike. So a layer gets a parameter of its own for the time of the merge,
and the shared one back when nothing is merged into it any more.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from multigraft.effective import touched
from multigraft.errors import MultigraftWarning, UnsupportedError
from multigraft.graft import Graft
from multigraft.layer import AdaptedLayer
from multigraft.roster import Roster
from multigraft.storage import Slot, slot_of


def to_part(
    roster: Roster, incoming: Mapping[int, Sequence[Graft]], layers: Sequence[AdaptedLayer]
) -> dict[int, list[str]]:
    """By layer, the tensors that need a parameter of their own before these grafts are merged.

    Args:
        incoming: what is merged, by the identity of the layer.

    Raises:
        UnsupportedError: something that acts on all sharing modules alike is merged already.
    """
    found: dict[int, list[str]] = {}
    for layer in layers:
        for name, modules in _shared(roster, layer, incoming[id(layer)]).items():
            if _is_common(layers, incoming, modules):
                continue
            merged = [g for x in roster.merged_layers for g in x.merged_grafts]
            if any(g.tied is not None and g.site.layer in modules for g in merged):
                raise UnsupportedError(
                    f"{layer.path}: `{name}` is shared with other modules, and what is merged "
                    "already acts on all of them, but this does not. Unmerge, and merge all of "
                    "them in one call."
                )
            _require_plain(layer, slot_of(layer.base_layer, name))
            found.setdefault(id(layer), []).append(name)
    return found


def part(layer: AdaptedLayer, names: Iterable[str]) -> None:
    """Give a layer parameters of its own in the place of these shared ones."""
    for name in names:
        slot = slot_of(layer.base_layer, name)
        whole = slot.layer._parameters[slot.name]
        assert whole is not None, "asked `to_part` first"
        layer.parted[name] = whole
        own = nn.Parameter(whole.detach().clone(), requires_grad=whole.requires_grad)
        slot.layer._parameters[slot.name] = own


def own_snapshots(grafts: Iterable[Graft]) -> list[Graft]:
    """What a layer merges: snapshots of its grafts, tied no longer where the weight is its own."""
    found = []
    for graft in grafts:
        twin = graft.snapshot()
        if twin.tied is not None and not _shares(twin):
            twin.tied = None
        found.append(twin)
    return found


def rejoin(layer: AdaptedLayer, names: Iterable[str]) -> None:
    """Put shared parameters back in the place of a layer's own."""
    for name in names:
        if name in layer.parted:
            slot = slot_of(layer.base_layer, name)
            slot.layer._parameters[slot.name] = layer.parted.pop(name)


def settle(layers: Iterable[AdaptedLayer]) -> None:
    """Let what is merged be the base from now on; says which parameters are shared no longer."""
    layers = list(layers)
    _keep_depth(layers)
    parted = []
    for layer in layers:
        parted += [f"{layer.path}.{name}" for name in layer.parted]
        layer.kept.clear()
        layer.parted.clear()
        layer.merged_grafts = []
    if parted:
        warnings.warn(
            f"{', '.join(parted)} shared a parameter with other modules, which the adapter does "
            "not change: it has one of its own now. Before saving a transformers model, set "
            "model.config.tie_word_embeddings = False, or loading will tie them again.",
            MultigraftWarning,
            stacklevel=3,
        )


def _keep_depth(layers: Sequence[AdaptedLayer]) -> None:
    """Let replicas stay where something is merged: the layers that they share cannot hold it."""
    deeper = next((x.roster.replication for x in layers if x.merged_grafts), None)
    if deeper is None:
        return
    deeper.settle()
    inside = {id(module) for module in deeper.stand_in.modules()}
    for layer in layers:
        layer.roster.replication = None
        if id(layer) in inside:
            layer.parted.clear()


def _shared(
    roster: Roster, layer: AdaptedLayer, grafts: Sequence[Graft]
) -> dict[str, list[nn.Module]]:
    """The tensors that these grafts change and other modules hold too, with all these modules."""
    found = {}
    for graft in grafts:
        names = [graft.site.key] if graft.tied is not None else []
        names += touched(graft)
        for name in names:
            modules = graft.site.shared.get(name.removeprefix(graft.site.key_of("")), ())
            slot = slot_of(layer.base_layer, name)
            whole = slot.layer._parameters.get(slot.name)
            holding = [m for m in modules if whole is not None and _holds(roster, m, whole)]
            if len(holding) > 1:
                found[name] = holding
    return found


def _holds(roster: Roster, module: nn.Module, whole: nn.Parameter) -> bool:
    """Whether a module holds this parameter, or will again when nothing is merged into it."""
    if any(own is whole for own in module._parameters.values()):
        return True
    return any(
        parted is whole and slot_of(layer.base_layer, name).layer is module
        for layer in roster.merged_layers
        for name, parted in layer.parted.items()
    )


def _is_common(
    layers: Sequence[AdaptedLayer],
    incoming: Mapping[int, Sequence[Graft]],
    modules: Sequence[nn.Module],
) -> bool:
    """Whether all that is or will be merged into these modules changes all of them alike."""
    here = [
        graft
        for layer in layers
        for graft in (*layer.merged_grafts, *incoming[id(layer)])
        if graft.site.layer in modules
    ]
    if not all(graft.method.follows_ties for graft in here):
        return False
    followed = [(g.adapter, id(g.site.tied)) for g in here if g.tied is not None]
    return all(
        followed.count((g.adapter, id(g.site))) == len(modules) - 1 for g in here if g.tied is None
    )


def _shares(graft: Graft) -> bool:
    """Whether a tied graft's layer still holds the parameter of the other site."""
    source = graft.site.tied
    name = graft.site.tensor_name
    return source is not None and (
        graft.site.layer._parameters.get(name) is source.layer._parameters.get(name)
    )


def _require_plain(layer: AdaptedLayer, slot: Slot) -> None:
    if type(slot.layer._parameters[slot.name]) is not nn.Parameter:
        raise UnsupportedError(
            f"{layer.path}: `{slot.name}` is stored as {slot.storage.name} and shared with other "
            "modules, which merging must not change. Keep the adapter, or untie the modules."
        )
