"""A plan as a table and as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from multigraft.planning.memory import MemoryPlan
from multigraft.planning.remedies import Remedy
from multigraft.planning.sizes import as_text, spread
from multigraft.planning.step import (
    ACTIVATIONS,
    ADAPTERS,
    BASE,
    GRADIENTS,
    LOSSES,
    OPTIMIZER,
    TEMPORARY,
)

ALLOWANCE = "allowance"
NOTES = {
    BASE: "frozen",
    ADAPTERS: "what trains",
    GRADIENTS: "so far, at the peak",
    OPTIMIZER: "",
    ACTIVATIONS: "kept for the backward pass",
    LOSSES: "every token learned",
    TEMPORARY: "what lives for moments, at the peak",
    ALLOWANCE: "estimate: the driver's context, workspaces, fragments",
}


def rows(plan: MemoryPlan) -> list[tuple[str, str, str]]:
    """Part, bytes as text, and a note."""
    found = [(part, as_text(size), NOTES[part]) for part, size in plan.parts.items()]
    if plan.allowance:
        found.append((ALLOWANCE, as_text(plan.allowance), NOTES[ALLOWANCE]))
    return [*found, ("peak", as_text(plan.total), verdict(plan))]


def verdict(plan: MemoryPlan) -> str:
    """Whether it fits."""
    available = plan.request.available
    if available is None:
        return "give `--memory` to know what fits"
    word = "fits into" if plan.fits else "does not fit into"
    return f"{word} {as_text(available)}"


def heading(plan: MemoryPlan) -> str:
    """What is planned, in a line."""
    request = plan.request
    names = list(request.adapters)
    who = f"{len(names)} adapters" if len(names) > 1 else str(request.adapters[names[0]].peft_type)
    base = f"{type(plan.bench.base).__name__} ({plan.parameters / 1e9:,.3g} billion parameters"
    packed = f", {request.quantize}" if request.quantize else ""
    each = " each" if len(names) > 1 else ""
    more = ", gradient checkpointing" if request.gradient_checkpointing else ""
    return (
        f"{who} on {base}{packed}): {plan.trained:,} trainable parameters, "
        f"{spread(request.batch_size)} rows{each} of {spread(request.max_length)} tokens, "
        f"{request.optimizer}{more}"
    )


def text(plan: MemoryPlan, remedies: Sequence[Remedy] = ()) -> str:
    """The whole plan, line by line."""
    lines = [heading(plan), ""]
    lines += [f"   {part:<17} {size:>11}   {note}".rstrip() for part, size, note in rows(plan)]
    if plan.largest_batch is not None:
        each = " of each adapter" if len(plan.request.adapters) > 1 else ""
        lines += ["", f"largest batch that fits: {plan.largest_batch} rows{each}"]
    if remedies:
        lines += ["", "what would help:"]
        lines += [f"   {remedy}" for remedy in remedies]
    return "\n".join(lines)


def as_data(plan: MemoryPlan, remedies: Sequence[Remedy] = ()) -> dict[str, Any]:
    """The whole plan, for JSON; sizes in bytes."""
    request = plan.request
    return {
        "model": type(plan.bench.base).__name__,
        "parameters": plan.parameters,
        "trainable_parameters": plan.trained,
        "adapters": {name: str(config.peft_type) for name, config in request.adapters.items()},
        "batch_size": request.batch_size,
        "max_length": request.max_length,
        "task": request.task,
        "dtype": request.dtype,
        "quantize": request.quantize,
        "optimizer": request.optimizer,
        "gradient_checkpointing": request.gradient_checkpointing,
        "accumulate": request.accumulate,
        "device": request.device,
        "parts": dict(plan.parts),
        "kept_for_backward": plan.kept,
        "flops": plan.flops,
        "peak": plan.peak,
        "allowance": plan.allowance,
        "total": plan.total,
        "memory": request.available,
        "fits": plan.fits,
        "largest_batch": plan.largest_batch,
        "remedies": [
            {
                "change": dict([remedy.change]),
                "price": remedy.price,
                "saved": remedy.saved,
                "fits": remedy.fits,
            }
            for remedy in remedies
        ],
    }
