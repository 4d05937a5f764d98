"""A dry run as a table: a line for each module pattern, with the reason for its verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING

from multigraft.inspection.targets import TargetGroup, TargetPlan

if TYPE_CHECKING:
    from rich.console import RenderableType

HEAD = ("", "module", "kind", "rank", "parameters", "why")
_TO_THE_RIGHT = frozenset({"rank", "parameters"})


def title(plan: TargetPlan) -> str:
    """What the whole would be: base, method, sites, parameters."""
    sites, share = len(plan.chosen), 100 * plan.parameters / max(1, plan.base_parameters)
    what = (
        f"{sites} module{'' if sites == 1 else 's'}, {plan.parameters:,} trainable parameters "
        f"({share:.3g} % of the base's)"
        if plan.fits
        else "cannot be attached"
    )
    return f"{plan.method} on {plan.base} ({plan.base_parameters:,} parameters): {what}"


def remarks(plan: TargetPlan) -> list[str]:
    """Problems and notes, a line each."""
    shared = f"{plan.elsewhere:,} of the trainable parameters belong to no single module."
    return [
        *(f"problem: {problem}" for problem in plan.problems),
        *(f"note: {note}" for note in plan.notes),
        *([f"note: {shared}"] if plan.elsewhere else []),
    ]


def shown(plan: TargetPlan) -> list[TargetGroup]:
    """The groups that a table lists: not the containers, which hold no tensors themselves."""
    return [g for g in plan.groups if g.first.is_chosen or g.first.holds_tensors]


def cells(group: TargetGroup) -> tuple[str, ...]:
    """One line, in the order of `HEAD`."""
    first, count = group.first, len(group.modules)
    size = "×".join(map(str, first.shape))
    ranks = dict.fromkeys(part.rank for part in first.parts if part.rank)
    return (
        "✓" if first.is_chosen else "–",
        f"{group.pattern}{f'  ×{count}' if count > 1 else ''}",
        f"{first.kind} {size}".rstrip(),
        ", ".join(map(str, ranks)),
        f"{group.parameters:,}" if first.is_chosen and first.parts else "",
        first.reason,
    )


def text(plan: TargetPlan) -> str:
    """The table as plain text."""
    grid = [HEAD, *map(cells, shown(plan))]
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    body = (
        "  ".join(
            cell.rjust(width) if name in _TO_THE_RIGHT else cell.ljust(width)
            for cell, width, name in zip(line, widths, HEAD, strict=True)
        ).rstrip()
        for line in grid
    )
    return "\n".join([title(plan), *remarks(plan), "", *body])


def rich_table(plan: TargetPlan) -> RenderableType:
    """The table as rich draws it."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in HEAD:
        side = "right" if name in _TO_THE_RIGHT else "left"
        table.add_column(name, justify=side, overflow="fold")  # type: ignore[arg-type]
    for group in shown(plan):
        style = "" if group.first.is_chosen else "dim"
        table.add_row(*map(Text, cells(group)), style=style)
    lines = [Text(line, style="red" if line[0] == "p" else "yellow") for line in remarks(plan)]
    return Group(Text(title(plan), style="bold"), *lines, "", table)
