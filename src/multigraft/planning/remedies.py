"""What to change when a step does not fit, and how much each change saves: planned, not guessed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from multigraft.errors import MultigraftError
from multigraft.planning.memory import MemoryPlan, Request, planned
from multigraft.planning.sizes import as_text

SHORTEST = 128
"""Rows are not shortened below so many tokens."""


@dataclass(frozen=True)
class Remedy:
    """One change to a request.

    Args:
        change: field and value.
        price: what it costs.
        saved: bytes less than before; negative where it takes more.
        fits: whether the step then fits; None where the memory is not known.
    """

    change: tuple[str, object]
    price: str
    saved: int
    fits: bool | None

    def __str__(self) -> str:
        name, value = self.change
        enough = "" if self.fits is None else ", enough" if self.fits else ", not enough alone"
        return f"`{name}: {_plain(value)}` saves {as_text(self.saved)}{enough} ({self.price})"


def remedies(plan: MemoryPlan) -> list[Remedy]:
    """Changes that save memory, those that suffice first, the cheapest of them first."""
    found = []
    for change, price in _changes(plan):
        try:
            other = planned(plan.request.but(**dict([change])))
        except MultigraftError:
            continue  # this model cannot: it has no checkpointing, or its layers cannot be packed
        saved = plan.total - other.total
        if saved > 0:
            found.append(Remedy(change, price, saved, other.fits))
    return sorted(found, key=lambda remedy: not remedy.fits)


def _changes(plan: MemoryPlan) -> Iterator[tuple[tuple[str, object], str]]:
    request = plan.request
    if request.batch_size > 1:
        fitting = plan.largest_batch or request.batch_size // 2
        rows = max(1, min(fitting, request.batch_size - 1))
        parts = -(-request.batch_size // rows) * request.accumulate
        yield ("batch_size", rows), f"with `accumulate: {parts}` the step learns from as many rows"
    if not request.gradient_checkpointing:
        yield ("gradient_checkpointing", True), "about a third more time"
    if request.max_length >= 2 * SHORTEST:
        yield ("max_length", request.max_length // 2), "longer examples are cut"
    if request.quantize is None:
        yield ("quantize", "nf4"), "the base is rounded to 4 bits"
    if request.optimizer == "adamw":
        yield ("optimizer", "adamw8bit"), "the optimiser's state is rounded to 8 bits"


def advice(plan: MemoryPlan, most: int = 3) -> str:
    """What to lower and by how much, in a sentence or two; for a step that ran out of memory."""
    request = plan.request
    asked = (
        f"A step with `batch_size` {request.batch_size} and `max_length` {request.max_length} "
        f"takes about {as_text(plan.total)}"
    )
    available = request.available
    there = f" of {as_text(available)}" if available is not None else ""
    found = remedies(plan)
    if not found:
        return f"{asked}{there}. Nothing that can be changed here saves memory."
    enough = [remedy for remedy in found if remedy.fits]
    listed = "; ".join(str(remedy) for remedy in (enough or found)[:most])
    alone = "" if enough or available is None else " None of them suffices alone; combine them."
    return f"{asked}{there}. {listed}.{alone}"


def out_of_memory(request: Request) -> str:
    """What to change after a device ran out of memory in a run of this request."""
    try:
        return advice(planned(request))
    except MultigraftError:  # the model cannot be planned; what helps is known all the same
        return (
            f"Lower `batch_size` (={request.batch_size}) and raise `accumulate` by as much, lower "
            f"`max_length` (={request.max_length}), or set `gradient_checkpointing`."
        )


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
