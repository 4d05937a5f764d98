"""What is trainable and what is merged fits together."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from multigraft.inspection.checks.contract import Subject, Violation, check
from multigraft.inspection.places import Part, Place
from multigraft.layer import AdaptedLayer, Plan


@check("trainable base")
def trainable_bases(subject: Subject) -> Iterator[Violation]:
    """A base layer that trains along: whatever one adapter learns there moves all others."""
    owned = {id(t) for _, part in subject.parts for t in part.tensors.values()}
    kept = set(_BIASES) & {str(getattr(c, "bias", "")) for c in subject.foreign_configs.values()}
    for place in subject.places:
        trained = [
            name
            for name, parameter in place.base.named_parameters()
            if parameter.requires_grad
            and id(parameter) not in owned
            and not (kept and name.rpartition(".")[2] == "bias")
        ]
        if trained:
            names = ", ".join(f"`{name}`" for name in trained)
            yield Violation(
                "trainable base",
                place.path,
                f"{names} of the base layer requires gradients: every adapter on it would change.",
                "Freeze it: requires_grad_(False). To train the whole module, name it in "
                "`modules_to_save`.",
            )


@check("half merged")
def half_merged(subject: Subject) -> Iterator[Violation]:
    """An adapter that is merged at some of its sites only."""
    merged = {part.name for _, part in subject.parts if part.is_merged}
    for place, part in subject.parts:
        if part.name in merged and not part.is_merged and _can_merge(place, part):
            yield Violation(
                "half merged",
                place.path,
                f"`{part.name}` is merged elsewhere, and not here.",
                "Call unmerge_adapter(), and merge it again as a whole.",
            )


@check("merged and active")
def merged_and_active(subject: Subject) -> Iterator[Violation]:
    """What is merged acts through the base's weights, and must act there once and as wanted."""
    for place in subject.places:
        inside = [part for part in place.parts if part.is_merged]
        if not inside:
            continue
        if isinstance(place.layer, AdaptedLayer):
            yield from _twice(place, place.layer)
        else:
            yield from _at_odds(place, inside)
        for part in inside:
            if part.trains:
                yield Violation(
                    "merged and active",
                    place.path,
                    f"`{part.name}` is merged and trainable: it gets no gradient.",
                    "Call unmerge_adapter() before training, or freeze the adapter.",
                    is_note=True,
                )


_BIASES = ("all", "lora_only")
"""What PEFT's configs say where they train the base's own biases."""


def _can_merge(place: Place, part: Part) -> bool:
    """Whether the place could be merged at all: PEFT never merges trained copies."""
    return place.is_ours or part.method != "SAVED_MODULE"


def _twice(place: Place, layer: AdaptedLayer) -> Iterator[Violation]:
    merged = {(g.adapter, str(g.site)) for g in layer.merged_grafts}
    for name in dict.fromkeys(g.adapter for g in _acting(layer.plan)):
        acting = {(g.adapter, str(g.site)) for g in _acting(layer.plan) if g.adapter == name}
        if acting <= merged and not _replaced(layer.plan):
            yield Violation(
                "merged and active",
                place.path,
                f"`{name}` is merged and acts beside the base as well: its change counts twice.",
                "Call unmerge_adapter(), then set_adapter() to what is to act.",
            )


def _acting(plan: Plan) -> list:
    rebound = [graft for _, grafts in plan.rebinds for graft in grafts]
    return [*plan.inputs, *plan.deltas, *rebound]


def _replaced(plan: Plan) -> bool:
    """Whether a trained copy stands in for the base, which lacks what is merged into that."""
    return plan.stand_in is not None


def _at_odds(place: Place, inside: list[Part]) -> Iterator[Violation]:
    """PEFT runs the base layer alone while anything is merged, whoever is active."""
    names = {part.name for part in inside}
    idle = [part.name for part in place.parts if part.is_active and part.name not in names]
    stuck = [part.name for part in inside if not part.is_active]
    if idle:
        which = ", ".join(f"`{name}`" for name in idle)
        yield Violation(
            "merged and active",
            place.path,
            f"{which} is active but does not act, since another adapter is merged here.",
            "Call unmerge_adapter(), or merge all active adapters.",
        )
    if stuck and not _is_disabled(place.layer):
        which = ", ".join(f"`{name}`" for name in stuck)
        yield Violation(
            "merged and active",
            place.path,
            f"{which} is merged, so it acts, but is not active.",
            "Call unmerge_adapter(), then set_adapter() to what is to act.",
        )


def _is_disabled(layer: nn.Module) -> bool:
    return bool(getattr(layer, "disable_adapters", False))
