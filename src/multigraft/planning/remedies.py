"""What to change when a step does not fit, and how much each change saves: planned, not guessed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from multigraft.errors import MultigraftError
from multigraft.planning.memory import MemoryPlan, planned
from multigraft.planning.request import Request
from multigraft.planning.sizes import as_text, spread

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
    if request.most_rows > 1:
        rows, times = _fewer_rows(plan)
        parts = times * request.accumulate
        yield ("batch_size", rows), f"with `accumulate: {parts}` the step learns from as many rows"
    if not request.gradient_checkpointing:
        yield ("gradient_checkpointing", True), "about a third more time"
    if request.longest >= 2 * SHORTEST:
        yield ("max_length", _halved(request.max_length)), "longer examples are cut"
    if request.quantize is None:
        yield ("quantize", "nf4"), "the base is rounded to 4 bits"
    if request.optimizer == "adamw":
        yield ("optimizer", "adamw8bit"), "the optimiser's state is rounded to 8 bits"


def _fewer_rows(plan: MemoryPlan) -> tuple[int | dict[str, int], int]:
    """The largest batch that fits, or half of what each adapter has; and how often it is needed."""
    asked = plan.request.batch_size
    if not isinstance(asked, int):
        return _halved(asked), 2
    fitting = asked // 2 if plan.largest_batch is None else plan.largest_batch
    rows = max(1, min(fitting, asked - 1))
    return rows, -(-asked // rows)


def _halved(value: int | Mapping[str, int]) -> Any:
    if isinstance(value, int):
        return value // 2
    return {name: max(1, own // 2) for name, own in value.items()}


def advice(plan: MemoryPlan, most: int = 3) -> str:
    """What to lower and by how much, in a sentence or two; for a step that ran out of memory."""
    request = plan.request
    asked = (
        f"A step with `batch_size` {spread(request.batch_size)} and `max_length` "
        f"{spread(request.max_length)} takes about {as_text(plan.total)}"
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
            f"Lower `batch_size` (={spread(request.batch_size)}) and raise `accumulate` by as "
            f"much, lower `max_length` (={spread(request.max_length)}), or set "
            "`gradient_checkpointing`."
        )


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
