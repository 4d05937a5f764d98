"""A difference between two adapters, as text: config, tensors, changes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from multigraft.inspection.diff import (
    ChangeDifference,
    Difference,
    FieldDifference,
    TensorDifference,
)
from multigraft.inspection.structure import fold

if TYPE_CHECKING:
    from rich.console import RenderableType

EQUAL = 1e-6
"""Relative distance from which two changes are called equal: float32's rounding."""

_INDEX = re.compile(r"(^|\.)\d+(?=\.|$)")
_TENSORS = ("", "tensor", "first", "second", "largest", "relative", "cosine")
_CHANGES = ("change at", "‖first‖", "‖second‖", "‖first - second‖", "relative", "cosine")

Section = tuple[str, tuple[str, ...], list[tuple[str, ...]]]
"""A title, its table's head, and its lines."""


def sections(difference: Difference) -> list[Section]:
    """What differs, part by part, repeats folded; a part in which nothing does is left out.

    A line that stands for several shows the largest distances among them, the smallest cosine, and
    norms over all of them.
    """
    found: list[Section] = []
    if difference.fields:
        found.append(
            ("config", ("key", "first", "second"), [_field(each) for each in difference.fields])
        )
    if difference.tensors:
        title = f"tensors: {len(difference.tensors)} differ, {difference.same} are the same"
        found.append((title, _TENSORS, [_tensors(each) for each in _alike(difference.tensors)]))
    if difference.changes:
        found.append(
            (
                _summary(difference),
                _CHANGES,
                [_changes(each) for each in _apart(difference.changes)],
            )
        )
    return found


def title(difference: Difference) -> str:
    """The two, and whether they are the same."""
    verdict = "are the same" if difference.is_same else "differ"
    return f"{difference.first} and {difference.second} {verdict}"


def text(difference: Difference) -> str:
    """All of it as plain text."""
    lines = [title(difference)]
    for name, head, rows in sections(difference):
        grid = [head, *rows]
        widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
        lines += ["", name]
        lines += [
            "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
            for row in grid
        ]
    return "\n".join([*lines, *_left(difference)])


def rich_group(difference: Difference) -> RenderableType:
    """All of it as rich draws it."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    style = "green" if difference.is_same else "bold"
    parts: list[Any] = [Text(title(difference), style=style)]
    for name, head, rows in sections(difference):
        table = Table(title=Text(name), title_justify="left", box=None, pad_edge=False)
        for column in head:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row), style={"+": "green", "-": "red"}.get(row[0], ""))
        parts += ["", table]
    return Group(*parts, *map(Text, _left(difference)))


def _field(each: FieldDifference) -> tuple[str, ...]:
    values = ((each.first, each.in_first), (each.second, each.in_second))
    return (each.key, *(_short(json.dumps(v)) if there else "–" for v, there in values))


def _alike(tensors: Iterable[TensorDifference]) -> Iterable[list[TensorDifference]]:
    """Those that differ in the same way, and in indices of their key alone."""
    found: dict[tuple[str, ...], list[TensorDifference]] = {}
    for each in tensors:
        key = (_INDEX.sub(r"\1*", each.key), each.kind, each.first, each.second)
        found.setdefault(key, []).append(each)
    return found.values()


def _apart(changes: Iterable[ChangeDifference]) -> Iterable[list[ChangeDifference]]:
    """Sites that differ in indices of their path alone; those where changes are equal apart."""
    found: dict[tuple[str, bool], list[ChangeDifference]] = {}
    for each in changes:
        key = (_INDEX.sub(r"\1*", each.path), each.relative <= EQUAL)
        found.setdefault(key, []).append(each)
    return found.values()


def _tensors(alike: Sequence[TensorDifference]) -> tuple[str, ...]:
    first = alike[0]
    mark = {"added": "+", "removed": "-"}.get(first.kind, "~")
    worst = (
        max((t.largest for t in alike if t.largest is not None), default=None),
        max((t.relative for t in alike if t.relative is not None), default=None),
        min((t.cosine for t in alike if t.cosine is not None), default=None),
    )
    where = _folded([each.key for each in alike])
    return (mark, where, first.first or "–", first.second or "–", *map(_figure, worst))


def _changes(alike: Sequence[ChangeDifference]) -> tuple[str, ...]:
    figures = (
        math.hypot(*(each.first for each in alike)),
        math.hypot(*(each.second for each in alike)),
        math.hypot(*(each.distance for each in alike)),
        max(each.relative for each in alike),
        min((each.cosine for each in alike if each.cosine is not None), default=None),
    )
    return (_folded([each.path for each in alike]), *map(_figure, figures))


def _folded(paths: Sequence[str]) -> str:
    return f"{fold(paths)}  ×{len(paths)}" if len(paths) > 1 else paths[0]


def _summary(difference: Difference) -> str:
    equal = sum(c.relative <= EQUAL for c in difference.changes)
    sites = len(difference.changes)
    if equal == sites:
        return f"changes: equal at all {sites} sites, whatever the factors"
    return f"changes: {sites - equal} of {sites} sites differ"


def _left(difference: Difference) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for where, reason in difference.left.items():
        by_reason.setdefault(reason, []).append(where)
    return [
        f"\nnot compared as a change: {_few(places)} ({reason})"
        for reason, places in by_reason.items()
    ]


def _few(places: list[str], limit: int = 3) -> str:
    more = f" and {len(places) - limit} more" if len(places) > limit else ""
    return f"{', '.join(places[:limit])}{more}"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _short(value: str, limit: int = 60) -> str:
    return value if len(value) <= limit else f"{value[: limit - 1]}…"
