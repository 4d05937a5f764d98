"""Merging adapters into the base's own tensors, and out again, for every method and storage.

    W' = stand-in or W,  mapped by the merged maps,  + Σ ΔW        each relative to the base's own W

Values are computed in float32 (float64 for float64 weights) and rounded once, into the storage's
format. What the base held is kept, so that unmerge restores the very bits, whatever has happened
to the adapters since; ``keep_original=False`` saves that memory and subtracts instead. Where a
format is lossy, the error of quantising again is measured and reported.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from multigraft.effective import in_dtype, mapped, touched
from multigraft.errors import MergeError, MultigraftWarning, StateError, UnsupportedError
from multigraft.finite import is_finite
from multigraft.graft import Graft
from multigraft.layer import AdaptedLayer
from multigraft.requantisation import Loss, report
from multigraft.roster import Roster
from multigraft.rowwise import add_products, products
from multigraft.storage import FOREIGN, Slot, slot_of
from multigraft.ties import own_snapshots, part, rejoin, to_part


def merge(
    roster: Roster,
    names: Sequence[str] | None = None,
    *,
    safe: bool = False,
    keep_original: bool = True,
    layers: Sequence[AdaptedLayer] | None = None,
) -> list[Loss]:
    """Merge adapters (the active ones by default) at all their sites, or at none.

    Args:
        safe: also check the merged tensors, not only what is added, for NaN and infinity.
        keep_original: keep the base's tensors for an exact unmerge.
        layers: only at these; layers that share a weight go together.

    Returns:
        What lossy storages lost, tensor by tensor; a warning names the largest.

    Raises:
        StateError: one of them is merged already; adapters are disabled; two replace one module.
        UnsupportedError: a method or a storage cannot merge; says which and what to do.
        MergeError: a value that would be written is not finite.
    """
    if names is None:
        names = [n for n in roster.active if n not in roster.merged]
        if not names:
            warnings.warn("no active adapter is left to merge.", MultigraftWarning, stacklevel=3)
            return []
    names = roster.require(names)
    if not roster.enabled:
        raise StateError("adapters are disabled; leave disable_adapter() before merging.")
    _refuse_contexts(roster, names)
    again = [n for n in names if n in roster.merged]
    if again:
        raise StateError(f"adapters {again} are merged already; unmerge_adapter() takes them out.")
    roster.need(names)
    layers = roster.touched(names) if layers is None else layers
    incoming = {id(x): [g for n in names for g in x.grafts.get(n, ())] for x in layers}
    for layer in layers:
        _check(layer, incoming[id(layer)], keep_original)
    done: list[tuple[AdaptedLayer, list[Graft], dict[str, Any]]] = []
    losses: list[Loss] = []
    known = dict(roster.losses)
    parting = to_part(roster, incoming, layers)
    try:
        for layer in layers:
            part(layer, parting.get(id(layer), ()))
        for layer in layers:
            grafts = own_snapshots(incoming[id(layer)])
            tensors = _tensor_names(grafts)
            before = {n: slot_of(layer.base_layer, n).keep() for n in tensors}
            done.append((layer, layer.merged_grafts, {"kept": dict(layer.kept), "values": before}))
            losses += _write(layer, grafts, before, safe, keep_original)
    except BaseException:
        for layer, grafts, state in reversed(done):
            _restore(layer, grafts, state)
        for layer in layers:
            rejoin(layer, parting.get(id(layer), ()))
        roster.losses = known
        raise
    report(losses)
    return losses


def _refuse_contexts(roster: Roster, names: Sequence[str]) -> None:
    for name in names:
        context = roster.context_of(name)
        if context is not None:
            raise UnsupportedError(
                f"adapter `{name}` is a {context.name}: it changes what the model is given and no "
                "weight, so there is nothing to merge. Name the weight adapters: "
                "adapter_names=[...]."
            )


def unmerge(roster: Roster, names: Sequence[str] | None = None) -> None:
    """Take merged adapters (all by default) out of the base again.

    Raises:
        StateError: one of them is not merged.
    """
    merged = roster.merged
    if merged and not roster.enabled:
        raise StateError("adapters are disabled; leave disable_adapter() before unmerging.")
    if names is None:
        if not merged:
            warnings.warn("no adapter is merged; nothing to do.", MultigraftWarning, stacklevel=3)
        names = merged
    names = roster.require(names)
    not_merged = [n for n in names if n not in merged]
    if not_merged:
        raise StateError(f"adapters {not_merged} are not merged; merged are {merged or 'none'}.")
    for layer in roster.touched(names):
        unmerge_layer(layer, names)


@torch.no_grad()
def unmerge_layer(layer: AdaptedLayer, names: Sequence[str] | None = None) -> None:
    """Take these adapters (all by default) out of one layer's tensors."""
    gone = set(layer.merged_adapters if names is None else names)
    leaving = [g for g in layer.merged_grafts if g.adapter in gone]
    staying = [g for g in layer.merged_grafts if g.adapter not in gone]
    for tensor in _tensor_names(leaving):
        slot = slot_of(layer.base_layer, tensor)
        rest = [g for g in staying if tensor in _tensor_names([g])]
        layer.roster.losses.pop(f"{layer.path}.{tensor}", None)
        if tensor not in layer.kept:
            value = _fresh(slot.read())
            _accumulate(value, leaving, tensor, -1.0)
            slot.write(value)
        elif rest:
            own = slot.read_kept(layer.kept[tensor])
            value = merged_value(layer, rest, tensor, own)
            slot.write(value)
            _measure(layer, tensor, slot, own, value)
        else:
            slot.give_back(layer.kept.pop(tensor))
        if not rest:
            rejoin(layer, [tensor])
    layer.merged_grafts = staying
    layer.replan()


def hide(roster: Roster) -> list[tuple[AdaptedLayer, dict[str, Any]]]:
    """Put the base's own tensors back for a while; `show` undoes it.

    Raises:
        StateError: the originals were not kept.
    """
    layers = list(roster.merged_layers)
    for layer in layers:
        names = _tensor_names(layer.merged_grafts)
        if any(name not in layer.kept for name in names):
            raise StateError(
                f"{layer.path}: merged with keep_original=False, so the base's own values are not "
                "at hand. Call unmerge_adapter() before disabling adapters."
            )
    hidden = []
    for layer in layers:
        state = {n: slot_of(layer.base_layer, n).keep() for n in layer.kept}
        _give_back(layer, layer.kept)
        hidden.append((layer, state))
    return hidden


def show(hidden: Sequence[tuple[AdaptedLayer, dict[str, Any]]]) -> None:
    """Put back what `hide` took out."""
    for layer, state in hidden:
        _give_back(layer, state)


@torch.no_grad()
def merged_value(layer: AdaptedLayer, grafts: Sequence[Graft], name: str, own: Tensor) -> Tensor:
    """The base tensor ``name`` with these grafts in it, in the accumulation dtype.

    Args:
        own: the base's own dense values, in the layer's layout.
    """
    here = [graft for graft in grafts if name in touched(graft)]
    value = own
    for graft in here:
        if graft.method.kind == "replace":
            value = graft.params[name.removeprefix(graft.site.key_of(""))]
    value = mapped(here, name, _fresh(value))
    return _accumulate(value, here, name, 1.0, own)


def _write(
    layer: AdaptedLayer, fresh: list[Graft], before: dict[str, Any], safe: bool, keep_original: bool
) -> list[Loss]:
    """Write one layer's merged tensors; the caller restores it when this fails.

    Args:
        fresh: what is merged now, beside what is merged already.
        before: what the storage held, by tensor name.
    """
    grafts = [*layer.merged_grafts, *fresh]
    losses = []
    for name, held in before.items():
        slot = slot_of(layer.base_layer, name)
        is_kept = name in layer.kept
        own = slot.read_kept(layer.kept[name]) if is_kept else slot.read()
        who = grafts if is_kept else fresh
        if keep_original:
            layer.kept.setdefault(name, held)
        check = partial(_require_finite, layer, fresh, name) if safe else None
        into, changes = slot.in_place(), products([g for g in who if name in touched(g)], name)
        if into is not None and changes is not None:
            add_products(own, into, changes, check)
            continue
        value = merged_value(layer, who, name, own)
        if check is not None:
            check(value)
        slot.write(value)
        losses += _measure(layer, name, slot, own, value)
    if not all(loss.is_finite for loss in losses):
        raise MergeError(
            f"{layer.path}: the merged values do not fit into the {layer.storage.name} format; "
            "nothing was merged. Check the adapter's tensors, or keep the adapter."
        )
    layer.merged_grafts = grafts
    layer.replan()
    return losses


def _require_finite(layer: AdaptedLayer, fresh: Sequence[Graft], name: str, value: Tensor) -> None:
    if not is_finite(value):
        raise MergeError(
            f"{layer.path}: merging {[g.adapter for g in fresh]} gives NaN or infinity in "
            f"`{name}`; nothing was merged. Check the adapter's tensors."
        )


def _check(layer: AdaptedLayer, grafts: Sequence[Graft], keep_original: bool) -> None:
    """Everything that could forbid the merge of these grafts here, before anything is written."""
    for graft in grafts:
        if not graft.method.mergeable:
            raise UnsupportedError(
                f"{layer.path}: `{graft.adapter}` is a {graft.method.title}, which has no "
                "merged form. Keep it as an adapter."
            )
        needs_own = graft.method.kind != "additive" or graft.method.needs_weight
        if needs_own and not keep_original:
            raise UnsupportedError(
                f"{layer.path}: {graft.method.name} cannot be taken out by subtraction; merge it "
                "with keep_original=True."
            )
        check_values(graft, layer.path, "merging it", "merged")
    _check_tensors(layer, grafts, keep_original)
    layer.plan_for(layer.roster.acting(), [*layer.merged_grafts, *grafts])


def check_values(graft: Graft, where: str, doing: str, done: str) -> None:
    """Fail unless every value of the graft is there and finite.

    Args:
        where, doing, done: for the message: the place, ``"merging it"``, ``"merged"``.

    Raises:
        StateError: a tensor is on the meta device.
        MergeError: a tensor holds NaN or infinity.
    """
    for name, tensor in graft.params.items():
        if tensor.is_meta:
            raise StateError(
                f"{where}: `{name}` of `{graft.adapter}` is on the meta device and holds no "
                f"values; load the adapter before {doing}."
            )
        if not is_finite(tensor):
            raise MergeError(
                f"{where}: `{name}` of `{graft.adapter}` holds NaN or infinity; nothing was "
                f"{done}. Retrain the adapter or load a good checkpoint."
            )


def _check_tensors(layer: AdaptedLayer, grafts: Sequence[Graft], keep_original: bool) -> None:
    """Everything about the tensors themselves that could forbid the merge."""
    together = [*layer.merged_grafts, *grafts]
    copies = [g for g in together if g.method.kind == "replace"]
    replaced = {name for g in copies for name in touched(g)}
    beside = [g for g in together if g.method.kind != "replace" and not g.site.rebinds]
    through_forward = {name for g in beside for name in touched(g)}
    for name in _tensor_names(together):
        slot = slot_of(layer.base_layer, name)
        # What a copy or another tensor takes the place of may mean there whatever it likes.
        is_exchanged = name in replaced or name not in through_forward
        reason = None if is_exchanged and slot.storage is FOREIGN else slot.refusal()
        inside = any(name.startswith(g.site.key_of("")) for g in copies)
        if inside and name not in replaced:
            reason = reason or (
                f"`{name}` is computed from tensors that a trained copy of this module replaces; "
                "merge one of the two adapters, and keep the other"
            )
        if reason:
            raise UnsupportedError(f"{layer.path}: cannot merge: {reason}.")
        if not (slot.storage.is_exact or keep_original):
            raise UnsupportedError(
                f"{layer.path}: cannot merge with keep_original=False: `{name}` is quantised "
                f"({slot.storage.name}), and subtracting would round a second time."
            )


def _measure(layer: AdaptedLayer, name: str, slot: Slot, own: Tensor, wanted: Tensor) -> list[Loss]:
    """What a lossy storage lost of what was just written there; nothing of an exact one."""
    if slot.storage.is_exact:
        return []
    loss = Loss.of(f"{layer.path}.{name}", slot.storage.name, own, wanted, slot.read())
    layer.roster.losses[loss.where] = loss
    return [loss]


def _give_back(layer: AdaptedLayer, state: Mapping[str, Any]) -> None:
    """Restore these tensors of one layer."""
    for name, kept in state.items():
        slot_of(layer.base_layer, name).give_back(kept)


def _tensor_names(grafts: Sequence[Graft]) -> list[str]:
    """The base tensors that these grafts change, each once."""
    return list(dict.fromkeys(name for graft in grafts for name in touched(graft)))


def _accumulate(
    total: Tensor, grafts: Sequence[Graft], name: str, sign: float, own: Tensor | None = None
) -> Tensor:
    """``total`` with the additive changes of these grafts added, or subtracted in place."""
    dtype = total.dtype
    for graft in grafts:
        if graft.method.kind != "additive":
            continue
        params = in_dtype(dtype, graft.params)
        if graft.site.key == name:
            base = own.to(dtype) if own is not None and graft.method.needs_weight else None
            if sign > 0:
                total = graft.method.add_delta(params, total, base)
            else:
                total.sub_(graft.method.delta(params, base))
        elif name == graft.site.key_of("bias") and graft.site.parameter is None:
            bias = graft.method.delta_bias(params)
            if bias is not None:
                total.add_(bias, alpha=sign)
    return total


def _fresh(tensor: Tensor) -> Tensor:
    """A copy in the dtype that merging accumulates in; counts stay what they are."""
    is_wide = tensor.dtype == torch.float64 or not tensor.is_floating_point()
    return tensor.detach().to(tensor.dtype if is_wide else torch.float32, copy=True)


def _restore(layer: AdaptedLayer, grafts: list[Graft], state: dict[str, Any]) -> None:
    """Put one layer back to what it was before a merge that failed."""
    _give_back(layer, state["values"])
    layer.kept.clear()
    layer.kept.update(state["kept"])
    layer.merged_grafts = grafts
    layer.replan()
