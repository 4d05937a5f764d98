"""Attaching and detaching: the only code that edits the module tree.

Everything is made and checked before the first edit; every edit is written into an undo log, so
that a failure half-way leaves the very object graph that was there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from multigraft.bases import READERS
from multigraft.config import PeftConfig
from multigraft.containers import AdapterDict
from multigraft.errors import NestingError
from multigraft.graft import Graft
from multigraft.layer import AdaptedLayer
from multigraft.prompts import Context
from multigraft.replication import Replication
from multigraft.roster import Roster
from multigraft.survey import Spot, survey


@dataclass(eq=False)
class Scion:
    """One graft that is ready to be set: its tensors are made, its place is known."""

    spot: Spot
    graft: Graft
    tensors: dict[str, Tensor] = field(default_factory=dict)
    module: nn.Module | None = None


def roster_of(model: nn.Module, spots: Sequence[Spot]) -> Roster | None:
    """The roster that this model's adapted layers share, or None.

    Raises:
        NestingError: a part of the model is adapted through another root.
    """
    rosters = {id(s.wrapper.roster): s.wrapper.roster for s in spots if s.wrapper is not None}
    for roster in rosters.values():
        if roster.root is not model:
            raise NestingError(
                f"a part of this model ({type(roster.root).__name__}) is adapted already, through "
                "a PeftModel of its own. Adapt both through the same root, or unload that one."
            )
    return next(iter(rosters.values()), None)


def roster_without_layers(model: nn.Module) -> Roster:
    """The roster of a model in which there is no adapted layer.

    Where it has adapters that act at layers, somebody else has put the base layers back, as
    diffusers does to unload adapters: they are gone, with what was merged left in the base.
    """
    roster = Roster.of(model)
    gone = [name for name, layers in roster.layers.items() if layers]
    if gone:
        roster.active = tuple(name for name in roster.active if name not in gone)
        roster.enabled, roster.hidden = True, []
        for name in gone:
            detach(roster, name)
        roster.merged_layers.clear()
        roster.siblings.clear()
        roster.losses.clear()
    return roster


def attach(
    roster: Roster,
    adapter: str,
    config: PeftConfig,
    scions: Sequence[Scion],
    context: Context | None = None,
    replication: Replication | None = None,
) -> None:
    """Set all grafts of one adapter and what it puts into the context, or nothing.

    The base is frozen with its first adapter; which of its parameters were trainable is remembered.
    """
    undo: list[Callable[[], None]] = []
    try:
        if replication is not None:
            undo.append(lambda: _restore_depth(roster))
            roster.replication = replication
            replication.put()
        if not roster.configs:
            _freeze(roster, undo)
        layers = _set(roster, adapter, scions, undo)
        if context is not None:
            undo.append(lambda: roster.let_go(adapter))
            roster.take_in(adapter, context)
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    roster.configs[adapter] = config
    roster.layers[adapter] = layers
    roster.trainable[adapter] = None
    if roster.residency is not None:
        roster.residency.arrive(adapter)


def exchange(
    roster: Roster,
    adapter: str,
    config: PeftConfig,
    scions: Sequence[Scion],
    context: Context | None = None,
) -> None:
    """Set an adapter's grafts anew in place of those that it has, or leave those as they are.

    It stays active or inactive; the base's ``requires_grad`` flags are not touched.
    """
    before = roster.layers[adapter]
    undo: list[Callable[[], None]] = []
    try:
        _exchange_context(roster, adapter, context, undo)
        for layer in before:
            undo.append(_remembered(layer))
            layer.remove(adapter)
        layers = _set(roster, adapter, scions, undo)
        touched = {id(x): x for x in (*before, *layers)}.values()
        for layer in touched:  # even while disabled: enabling them again must not fail
            layer.plan_for(roster.active, layer.merged_grafts)
        plans = [x.plan_for(roster.acting(), x.merged_grafts) for x in touched]
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    for layer, plan in zip(touched, plans, strict=True):
        layer.plan = plan
    roster.schedules.pop(adapter, None)
    roster.configs[adapter] = config
    roster.layers[adapter] = layers
    _unwrap(roster.root, [x for x in before if not x.grafts])


def detach(roster: Roster, adapter: str) -> None:
    """Take one adapter out; layers that are left without any give way to their base layer."""
    del roster.configs[adapter]
    roster.trainable.pop(adapter, None)
    roster.schedules.pop(adapter, None)
    roster.let_go(adapter)
    layers = roster.layers.pop(adapter)
    for layer in layers:
        layer.remove(adapter)
        layer.replan()
    _unwrap(roster.root, [x for x in layers if not x.grafts])
    if not roster.configs:
        thaw(roster)
        _restore_depth(roster)


def thaw(roster: Roster) -> None:
    """Give the base's parameters the ``requires_grad`` that they had before the first adapter."""
    for parameter in roster.thawed:
        parameter.requires_grad_(True)
    roster.thawed = []


def _restore_depth(roster: Roster) -> None:
    """Put the base's own list of layers back, if another one stands in for it."""
    if roster.replication is not None:
        roster.replication.take()
        roster.replication = None


def _exchange_context(
    roster: Roster, adapter: str, context: Context | None, undo: list[Callable[[], None]]
) -> None:
    """Put one context in another's place; either may be missing."""
    before = roster.context_of(adapter)
    if before is not None:
        undo.append(lambda: roster.take_in(adapter, before))
        roster.let_go(adapter)
    if context is not None:
        undo.append(lambda: roster.let_go(adapter))
        roster.take_in(adapter, context)


def _set(
    roster: Roster, adapter: str, scions: Sequence[Scion], undo: list[Callable[[], None]]
) -> list[AdaptedLayer]:
    """Register every graft at its adapted layer, wrapping where there is none yet."""
    layers: dict[int, AdaptedLayer] = {}
    for scion in scions:
        spot = scion.spot.host or scion.spot
        layer = spot.wrapper or _wrap(spot, roster, undo)
        undo.append(lambda layer=layer: _drop(layer, adapter))  # type: ignore[misc]
        if scion.module is not None:
            layer.add_stand_in(scion.graft, scion.module)
        else:
            layer.add(scion.graft, scion.tensors)
        layers[id(layer)] = layer
    return list(layers.values())


def _remembered(layer: AdaptedLayer) -> Callable[[], None]:
    """What puts this layer's grafts and containers back as they are now, in their order."""
    grafts = {name: list(held) for name, held in layer.grafts.items()}
    tables: list[tuple[Any, dict[str, Any]]] = [
        (table, dict(table))
        for module in (layer, *layer.children())
        if module is layer or isinstance(module, AdapterDict)
        for table in (module._modules, module._parameters, module._buffers)
    ]

    def put_back() -> None:
        layer.grafts.clear()
        layer.grafts.update(grafts)
        if grafts:
            layer.siblings.join(layer)
        for table, content in tables:
            table.clear()
            table.update(content)

    return put_back


def _wrap(spot: Spot, roster: Roster, undo: list[Callable[[], None]]) -> AdaptedLayer:
    is_read = any(name in (READERS.find(type(p)) or ()) for p, name in spot.places)
    layer = AdaptedLayer(spot.layer, spot.path, roster, is_read)
    for parent, name in spot.places:
        undo.append(lambda parent=parent, name=name: _put(parent, name, spot.layer))  # type: ignore[misc]
        _put(parent, name, layer)
    spot.wrapper = layer

    def forget() -> None:
        spot.wrapper = None

    undo.append(forget)
    return layer


def _unwrap(root: nn.Module, layers: Iterable[AdaptedLayer]) -> None:
    leaving = {id(layer) for layer in layers}
    if not leaving:
        return
    for spot in survey(root):
        if spot.wrapper is not None and id(spot.wrapper) in leaving:
            for parent, name in spot.places:
                _put(parent, name, spot.layer)


def _put(parent: nn.Module, name: str, child: nn.Module) -> None:
    """Replace a child without changing the order of the parent's children."""
    parent._modules[name] = child


def _drop(layer: AdaptedLayer, adapter: str) -> None:
    layer.remove(adapter)


def _freeze(roster: Roster, undo: list[Callable[[], None]]) -> None:
    roster.thawed = [p for p in roster.root.parameters() if p.requires_grad]
    undo.append(lambda: thaw(roster))
    for parameter in roster.thawed:
        parameter.requires_grad_(False)
