"""A heat map as a table: layers down, modules across, each cell with its number in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from multigraft.report.figures import SiteFigures
from multigraft.report.markup import Html, name, tag
from multigraft.report.numbers import figure

LEVELS = 9
"""How many shades there are, the first one for nothing."""

Cells = Mapping[tuple[int | None, str], Sequence[SiteFigures]]


def by_place(sites: Iterable[SiteFigures]) -> Cells:
    """Sites by layer and module; several where a module stands for many, such as experts."""
    found: dict[tuple[int | None, str], list[SiteFigures]] = {}
    for site in sites:
        found.setdefault((site.layer, site.module), []).append(site)
    return found


def together(sites: Sequence[SiteFigures]) -> tuple[float, float | None]:
    """The norm of what happens at several sites, and of their weights."""
    norm = math.sqrt(sum(site.norm**2 for site in sites))
    bases = [site.base_norm for site in sites]
    if any(base is None for base in bases):
        return norm, None
    return norm, math.sqrt(sum(base * base for base in bases if base is not None))


def heat_map(
    cells: Cells,
    value: Callable[[Sequence[SiteFigures]], float | None],
    words: Callable[[float | None], str],
    details: Callable[[Sequence[SiteFigures]], str],
    *,
    caption: Html,
    label: str,
    top: float,
    link: Callable[[SiteFigures], str],
) -> Html:
    """The table.

    Args:
        value: of a cell.
        words: a value as the cell shows it.
        details: what is said of a cell when it is pointed at.
        label: what the table is called by who cannot see it.
        top: the value of the strongest shade.
        link: the id of a site's own row elsewhere in the page.
    """
    layers = sorted({layer for layer, _ in cells}, key=lambda n: (n is None, n or 0))
    modules = list(dict.fromkeys(module for _, module in cells))
    head = tag(
        "tr",
        tag("th", "layer", scope="col"),
        (tag("th", name(module), scope="col") for module in modules),
    )
    rows = [
        tag(
            "tr",
            tag("th", "outside" if layer is None else layer, scope="row"),
            (
                _cell(cells.get((layer, module)), value, words, details, top, link)
                for module in modules
            ),
        )
        for layer in layers
    ]
    table = tag(
        "table", tag("caption", caption), tag("thead", head), tag("tbody", rows), class_="heat"
    )
    return tag("div", table, class_="scroll", role="region", aria_label=label, tabindex=0)


def legend(top: float, words: Callable[[float | None], str]) -> Html:
    """The shades and what they stand for."""
    steps = [
        tag("span", words(top * step / (LEVELS - 1)), class_=f"l{step}") for step in range(LEVELS)
    ]
    return tag("p", tag("span", "shades: "), steps, class_="legend", aria_hidden="true")


def _cell(
    sites: Sequence[SiteFigures] | None,
    value: Callable[[Sequence[SiteFigures]], float | None],
    words: Callable[[float | None], str],
    details: Callable[[Sequence[SiteFigures]], str],
    top: float,
    link: Callable[[SiteFigures], str],
) -> Html:
    if not sites:
        return tag("td", tag("span", "·", aria_label="none"), class_="none")
    found = value(sites)
    return tag(
        "td",
        words(found),
        class_=f"l{_level(found, top)}",
        tabindex=-1,
        data_say=details(sites),
        data_row=link(sites[0]) if len(sites) == 1 else None,
    )


def _level(value: float | None, top: float) -> int:
    if value is None or not math.isfinite(value) or value <= 0 or top <= 0:
        return 0
    return max(1, min(LEVELS - 1, round((LEVELS - 1) * value / top)))


def site_details(sites: Sequence[SiteFigures]) -> str:
    """What is said of a cell of norms."""
    norm, base = together(sites)
    first = sites[0]
    where = first.path if len(sites) == 1 else f"{len(sites)} sites, the first {first.path}"
    parts = [where, f"‖ΔW‖ {figure(norm)}"]
    if base:
        parts.append(f"‖W‖ {figure(base)}")
    if len(sites) == 1 and first.values:
        parts.append(f"effective rank {figure(first.effective_rank)} of {first.rank}")
    return " · ".join(parts)
