"""No graft on a graft: neither wrappers in wrappers nor handles on handles."""

from __future__ import annotations

from collections.abc import Iterator

from multigraft.inspection.checks.contract import Subject, Violation, check
from multigraft.inspection.places import HELD_AS, handles


@check("nested wrappers")
def nested_wrappers(subject: Subject) -> Iterator[Violation]:
    """A wrapper inside another adapter's wrapper: what hangs there adapts an adapter."""
    for place in subject.places:
        if place.outer is None or not place.is_nested:
            continue
        names = ", ".join(f"`{part.name}`" for part in place.parts) or "a wrapper"
        into = "base layer" if place.within.split(".")[0] in HELD_AS else "adapter"
        remedy = (
            "Put the inner wrapper's base layer back in its place, and add its adapters with "
            "model.add_adapter()."
            if place.is_ours
            else "Load the base model afresh and add each adapter to it with Multigraft, from its "
            "config and data, or from a checkpoint that was saved without the nest."
        )
        yield Violation(
            "nested wrappers",
            place.path,
            f"{names} lies inside another adapter's wrapper, in its {into} (`{place.within}`).",
            remedy,
        )


@check("nested handles")
def nested_handles(subject: Subject) -> Iterator[Violation]:
    """A handle of a handle: saving and switching at one does not reach the other's adapters."""
    for path, _ in list(handles(subject.model))[1:-1]:
        yield Violation(
            "nested handles",
            path,
            "a model with adapters was adapted a second time as a whole.",
            "Call get_peft_model() once, on the base model, and add_adapter() from then on.",
        )
