"""A structure as a table: a line for each site pattern, its adapters as a tree below it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from multigraft.inspection.structure import SiteAdapter, SiteGroup, Structure

if TYPE_CHECKING:
    from rich.console import RenderableType

HEAD = (
    *("site", "kind", "rank", "scaling", "active", "merged", "trainable"),
    *("dtype", "device", "parameters"),
)
_TO_THE_RIGHT = frozenset({"rank", "scaling", "parameters"})
_GAP = "  "


@dataclass(frozen=True)
class Row:
    """One line: its cells in the order of `HEAD`, and whether it is a site or an adapter."""

    cells: tuple[str, ...]
    is_site: bool
    is_nested: bool = False


def title(structure: Structure) -> str:
    """What the whole is: base, adapters, sites, and how many nests."""
    adapters, sites = len(structure.adapters), len(structure.sites)
    nests = len(structure.nested)
    return (
        f"{structure.base}: base of {structure.base_parameters:,} parameters "
        f"({structure.base_trainable:,} trainable), "
        f"{adapters} adapter{'' if adapters == 1 else 's'} at "
        f"{sites} site{'' if sites == 1 else 's'}" + (f", {nests} NESTED" if nests else "")
    )


def rows(structure: Structure) -> list[Row]:
    """Every line of the table, in the model's order."""
    found = []
    if structure.contexts:
        found.append(Row(("context", *("",) * (len(HEAD) - 1)), is_site=True))
        found += list(_below(structure.contexts, (), ""))
    for group in structure.groups:
        found += list(_rows(group, "", ""))
    return found


def text(structure: Structure) -> str:
    """The table as plain text."""
    lines = rows(structure)
    if not lines:
        return title(structure)
    grid = [HEAD, *(row.cells for row in lines)]
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    body = (
        _GAP.join(
            cell.rjust(width) if name in _TO_THE_RIGHT else cell.ljust(width)
            for cell, width, name in zip(cells, widths, HEAD, strict=True)
        ).rstrip()
        for cells in grid
    )
    return "\n".join([title(structure), "", *body])


def rich_table(structure: Structure) -> RenderableType:
    """The table as rich draws it."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title(structure)), title_justify="left", box=None, pad_edge=False)
    for name in HEAD:
        side = "right" if name in _TO_THE_RIGHT else "left"
        table.add_column(name, justify=side, overflow="fold")  # type: ignore[arg-type]
    for row in rows(structure):
        style = "bold red" if row.is_nested else "bold" if row.is_site else ""
        table.add_row(*map(Text, row.cells), style=style)
    return table


def show(structure: Structure) -> None:
    """Print it: with rich where that is installed, else as plain text."""
    if importlib.util.find_spec("rich") is None:
        sys.stdout.write(f"{text(structure)}\n")
        return
    from rich.console import Console

    console = Console()
    console.print(structure if console.is_terminal else text(structure), soft_wrap=True)


def _rows(group: SiteGroup, first: str, rest: str) -> Iterator[Row]:
    size = "×".join(map(str, group.shape))
    stored = "" if group.storage == "dense" else f" {group.storage}"
    times = f"  ×{len(group.sites)}" if len(group.sites) > 1 and not first else ""
    mark = "NESTED " if group.is_nested else ""
    yield Row(
        (
            f"{first}{mark}{group.pattern}{times}",
            f"{group.kind} {size}{stored}".rstrip(),
            *("", "", "", "", ""),
            *(group.dtype, group.device, f"{group.parameters:,}"),
        ),
        is_site=True,
        is_nested=group.is_nested,
    )
    yield from _below(group.adapters, group.inside, rest)


def _below(
    adapters: tuple[SiteAdapter, ...], inside: tuple[SiteGroup, ...], rest: str
) -> Iterator[Row]:
    below: list[SiteAdapter | SiteGroup] = [*adapters, *inside]
    for number, child in enumerate(below, start=1):
        is_last = number == len(below)
        first, deeper = ("└── ", "    ") if is_last else ("├── ", "│   ")
        if isinstance(child, SiteAdapter):
            yield Row(_cells(child, rest + first), is_site=False)
        else:
            yield from _rows(child, rest + first, rest + deeper)


def _cells(adapter: SiteAdapter, first: str) -> tuple[str, ...]:
    return (
        f"{first}{adapter.name}",
        adapter.method,
        str(adapter.rank or "–"),
        f"{adapter.scaling:g}",
        *("yes" if it else "–" for it in (adapter.is_active, adapter.is_merged)),
        "yes" if adapter.is_trainable else "–",
        *(adapter.dtype, adapter.device),
        f"{adapter.parameters:,}",
    )
