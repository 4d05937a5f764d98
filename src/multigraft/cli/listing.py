"""``multigraft list``: which adapters lie under a directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from multigraft.cli.screen import screen
from multigraft.inspection.listing import Listed, hub_cache, list_adapters

COLUMNS = ("name", "method", "rank", "task", "base", "parameters", "size", "saved")


def list_(
    folder: Annotated[
        Path | None, typer.Argument(help="Where to look [default: the present directory].")
    ] = None,
    hub: Annotated[bool, typer.Option("--hub", help="Look in the hub's cache.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> None:
    """List the adapters under a directory: method, rank, base, task, size, and when saved.

    Configs and the headers of files are read, and no tensor. Exits with 1 when one is damaged.

    Example: `multigraft list runs`
    """
    if hub and folder is not None:
        raise typer.BadParameter("--hub stands in place of a directory.")
    place = hub_cache() if hub else folder or Path()
    found = list_adapters(place)
    if as_json:
        print(json.dumps([each.to_dict() for each in found], indent=2, ensure_ascii=False))
    else:
        _show(found, place)
    raise typer.Exit(1 if any(each.problem for each in found) else 0)


def _show(found: list[Listed], place: Path) -> None:
    console = screen()
    if not found:
        console.print(f"no adapter lies under {place}", markup=False, soft_wrap=True)
        return
    rows = [(each, _cells(each)) for each in found]
    if console.is_terminal:
        table = Table(box=None)
        for column in COLUMNS:
            is_number = column in ("rank", "parameters", "size")
            table.add_column(column, justify="right" if is_number else "left", overflow="fold")
        for each, cells in rows:
            table.add_row(*(Text(cell, style="red" if each.problem else "") for cell in cells))
        console.print(table)
    else:
        lines = [list(COLUMNS), *(cells for _, cells in rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            text = "  ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)).rstrip()
            console.print(text, markup=False, soft_wrap=True)
    for each, _ in rows:
        if each.problem:
            console.print(f"{each.name}: {each.problem}", style="red", markup=False, soft_wrap=True)


def _cells(each: Listed) -> list[str]:
    low, high = each.rank or (0, 0)
    rank = "" if each.rank is None else str(low) if low == high else f"{low}-{high}"
    count = "" if each.parameters is None else f"{each.parameters:,}"
    saved = "" if each.saved is None else each.saved.astimezone().strftime("%Y-%m-%d %H:%M")
    method = f"{each.method} (damaged)".strip() if each.problem else each.method
    return [each.name, method, rank, each.task, each.base, count, _size(each.bytes), saved]


def _size(count: int) -> str:
    if not count:
        return ""
    number, units = float(count), iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while number >= 1000 and (larger := next(units, None)):
        number, unit = number / 1000, larger
    return f"{number:.3g} {unit}"
