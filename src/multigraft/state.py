"""Reading and writing one adapter's tensors on a live model, by their names on disk."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from multigraft.checkpoint import LoadReport, adapter_state, compare
from multigraft.containers import fetch, hold
from multigraft.embeddings import embedding_tensors
from multigraft.errors import StateError
from multigraft.keys import PREFIX, full_key, saved_tensors, strip_prefix
from multigraft.prompts.contract import Slot
from multigraft.roster import Roster
from multigraft.survey import survey
from multigraft.whole import fill, full_shape, gathered, is_parted
from multigraft.wrap import roster_of


def roster_of_model(model: nn.Module) -> tuple[Roster, str]:
    """The roster of a `PeftModel`, or of a model that was adapted in place, and its key prefix.

    Raises:
        StateError: the model has no adapters.
    """
    tuner = getattr(model, "base_model", None)
    roster = getattr(tuner, "roster", None)
    if isinstance(roster, Roster):
        return roster, PREFIX
    own = getattr(model, "roster", None)
    found = own if isinstance(own, Roster) else roster_of(model, survey(model))
    if found is None:
        raise StateError(f"{type(model).__name__} has no adapters; add one first.")
    return found, ""


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: str | bool = "auto",
) -> dict[str, Tensor]:
    """One adapter's own tensors by their names on disk; costs nothing for the other adapters.

    Args:
        model: a `PeftModel`, or a model adapted in place (then keys have no prefix).
        state_dict: the whole model's state dict to take values from, when the model is sharded.
        unwrap_compiled: kept for PEFT's signature; compiled models need no option here.
        save_embedding_layers: which of the base's embedding matrices go with it, see
            `multigraft.embeddings.embedding_tensors`.

    Raises:
        AdapterNameError: there is no such adapter.
    """
    roster, prefix = roster_of_model(model)
    roster.require_one(adapter_name)
    gathered = None
    if state_dict is not None:
        gathered = {strip_prefix(key): value for key, value in state_dict.items()}
    state = adapter_state(roster, adapter_name, gathered, joined=True)
    state |= embedding_tensors(roster, adapter_name, save_embedding_layers, gathered)
    return {full_key(key) if prefix else key: value for key, value in state.items()}


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
    strict: bool = True,
) -> LoadReport:
    """Write tensors, by their names on disk, into an adapter that the model has.

    Args:
        low_cpu_mem_usage: take over the given tensors instead of copying their values.
        strict: fail on missing, unexpected or non-finite tensors.

    Returns:
        The report, with `missing_keys` and `unexpected_keys` as torch names them.

    Raises:
        CheckpointError: the tensors do not fit; nothing was written.
        StateError: the adapter is merged.
    """
    roster, _ = roster_of_model(model)
    roster.require_one(adapter_name)
    found = {strip_prefix(key): value for key, value in peft_model_state_dict.items()}
    expected = {k: full_shape(t) for k, t in adapter_state(roster, adapter_name).items()}
    found = drop_base_tensors(found, expected, roster.root)
    optional = {
        key
        for layer in roster.layers[adapter_name]
        for key, graft, name in saved_tensors(layer, adapter_name)
        if name in graft.own_specs and graft.own_specs[name].optional
    }
    report, good = compare(expected, found, optional)
    report.check(f"the state dict for adapter `{adapter_name}`", strict, ignore_mismatched_sizes)
    write(roster, adapter_name, good, assign=low_cpu_mem_usage)
    return report


@torch.no_grad()
def write(
    roster: Roster, adapter: str, values: Mapping[str, Tensor], *, assign: bool = False
) -> None:
    """Put checked values into an adapter's tensors; parameters keep their identity unless on meta.

    Raises:
        StateError: the adapter is merged, so what it added could no longer be told.
    """
    if adapter in roster.merged:
        raise StateError(
            f"adapter `{adapter}` is merged into the base; its tensors cannot be replaced there. "
            "Call unmerge_adapter() first."
        )
    roster.forget_stacks()
    values, context = dict(values), roster.context_of(adapter)
    slots = context.slots() if context is not None else {}
    for layer in roster.layers[adapter]:
        for key, graft, name in saved_tensors(layer, adapter):
            if name not in graft.owners:  # tied: made of the other site's tensors
                continue
            slots[key] = graft.owners[name]
            if key in values:
                values[key] = graft.method.unpacked(name, values[key], graft.params[name])
    undo: list[tuple[Slot, Tensor, Tensor]] = []
    try:
        for key, slot in slots.items():
            if key in values:
                tensor = fetch(*slot)
                with gathered([tensor], writes=True):
                    undo.append((slot, tensor, tensor.clone()))
                    _put(slot, values[key], assign)
        for _, graft in roster.grafts(adapter):
            graft.retie()
            graft.complete()
    except BaseException:
        for slot, tensor, before in reversed(undo):
            with gathered([tensor], writes=True):
                tensor.data.copy_(before)
            hold(*slot, tensor)
        raise


def drop_base_tensors(
    found: Mapping[str, Tensor], expected: Mapping[str, object], root: nn.Module
) -> dict[str, Tensor]:
    """Without the copies of base tensors that PEFT writes into some files, where they are equal.

    These are the matrices of adapted embeddings, and with ``bias="all"`` the originals of saved
    modules. A copy that differs from the base stays, to be reported: the adapter was trained on
    another base.
    """
    kept = {}
    for key, value in found.items():
        if key not in expected and _is_base_copy(key, value, root):
            continue
        kept[key] = value
    return kept


def _is_base_copy(key: str, value: Tensor, root: nn.Module) -> bool:
    if ".modules_to_save." in key:
        return True  # beside the saved module's own key, which is expected, this is a duplicate
    for infix in (".base_layer.", ".original_module."):
        path, found, leaf = key.rpartition(infix)
        if found:
            spot = next((s for s in survey(root) if path in s.paths), None)
            own = getattr(spot.layer, leaf, None) if spot is not None else None
            return (
                isinstance(own, Tensor)
                and own.shape == value.shape
                and torch.equal(own.detach().to(value.dtype).cpu(), value.cpu())
            )
    return False


def _put(slot: Slot, value: Tensor, assign: bool) -> None:
    owner, leaf = slot
    tensor = fetch(owner, leaf)
    if is_parted(tensor) or not (assign or tensor.is_meta):
        fill(tensor, value)
        return
    moved = value.to(dtype=tensor.dtype) if tensor.is_meta else value
    if isinstance(tensor, nn.Parameter):
        moved = nn.Parameter(moved, requires_grad=tensor.requires_grad)
    hold(owner, leaf, moved)
