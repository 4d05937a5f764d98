"""The parts of the page that show each adapter by itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from multigraft.report import charts, heat
from multigraft.report.collect import AdapterFigures, Report
from multigraft.report.figures import SiteFigures
from multigraft.report.intruders import EPSILON, K
from multigraft.report.markup import Html, join, name, tag
from multigraft.report.numbers import count, figure, percent, size

MOST_REASONS = 20
Column = tuple[str, str]
"""A heading, and how its cells sort: ``number``, ``text``, or not at all."""


def table(
    caption: Html | str, columns: Sequence[Column], rows: Iterable[Html], *, label: str = ""
) -> Html:
    """A table that scrolls by itself where it is wider than the page."""
    head = [
        tag("th", title, scope="col", data_sort=kind or None, class_=kind or None)
        for title, kind in columns
    ]
    body = tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", head)),
        tag("tbody", rows),
    )
    return tag("div", body, class_="scroll", role="region", aria_label=label or None, tabindex=0)


def number(words: str | Html, value: float | int | None) -> Html:
    """A cell that sorts by ``value``."""
    return tag("td", words, class_="number", data_value=-1 if value is None else value)


def overview(report: Report) -> Html:
    """One line an adapter."""
    columns = [
        ("adapter", "text"),
        ("method", "text"),
        ("made for", "text"),
        ("sites", "number"),
        ("rank", "number"),
        ("effective rank", "number"),
        ("‖ΔW‖", "number"),
        ("‖ΔW‖ / ‖W‖", "number"),
        ("intruders", "number"),
        ("parameters", "number"),
        ("file", "number"),
    ]
    if report.base is None:
        columns = [c for c in columns if c[0] not in ("‖ΔW‖ / ‖W‖", "intruders")]
    return table(
        "The adapters of this report",
        columns,
        (_adapter_row(report, each) for each in report.adapters),
        label="overview",
    )


def _adapter_row(report: Report, each: AdapterFigures) -> Html:
    sites = each.sites.values()
    found = [site.intruders for site in sites if site.intruders is not None]
    cells = [
        tag("th", name(each.name), scope="row"),
        tag("td", each.method),
        tag("td", name(each.base) if each.base else "–"),
        number(str(len(sites)), len(sites)),
        number(ranks(sites), max((s.rank for s in sites), default=0)),
        number(figure(mean_rank(sites)), mean_rank(sites)),
        number(figure(each.norm), each.norm),
    ]
    if report.base is not None:
        cells.append(number(percent(each.relative), each.relative))
        cells.append(number(str(sum(found)) if found else "–", sum(found)))
    cells.append(number(count(each.parameters), each.parameters))
    cells.append(number(size(each.bytes), each.bytes))
    return tag("tr", cells)


def norms(report: Report, index: int, top: float) -> Html:
    """Where an adapter acts, and how strongly."""
    each = report.adapters[index]
    is_relative = report.base is not None
    words = percent if is_relative else figure
    what = "‖ΔW‖ / ‖W‖" if is_relative else "‖ΔW‖"
    shown = heat.heat_map(
        heat.by_place(each.sites.values()),
        strength if is_relative else lambda sites: heat.together(sites)[0],
        words,
        heat.site_details,
        caption=join((f"{what} of ", name(each.name), " by layer and module")),
        label=f"heat map of {each.name}",
        top=top,
        link=lambda site: row_id(report, index, site),
    )
    return join((heat.legend(top, words), shown, _said()))


def strength(sites: Sequence[SiteFigures]) -> float | None:
    """The size of a change beside that of what it changes."""
    norm, base = heat.together(sites)
    return norm / base if base else None


def intruders(report: Report, index: int) -> Html:
    """Where an adapter brings in directions that the base did not have."""
    each = report.adapters[index]
    sites = [site for site in each.sites.values() if site.intruders is not None]
    skipped = len(each.sites) - len(sites)
    left_out = tag(
        "p",
        f"{skipped} sites were not searched: the smaller side of their weight is over "
        f"{report.intruder_limit:,}, or they hold values that are not finite.",
    )
    if not sites:
        return left_out
    touched = sum(1 for site in sites if site.intruders)
    total = sum(site.intruders or 0 for site in sites)
    summary = tag(
        "p",
        f"{total} of the {K * len(sites)} leading directions at {len(sites)} sites are intruders; "
        f"{touched} sites have some.",
    )
    shown = heat.heat_map(
        heat.by_place(sites),
        lambda found: float(sum(site.intruders or 0 for site in found)),
        lambda value: f"{value or 0:.0f}",
        lambda found: f"{found[0].path} · {sum(s.intruders or 0 for s in found)} intruders",
        caption=join(
            ("Intruder dimensions of ", name(each.name), f", of {K} a site (ε = {EPSILON})")
        ),
        label=f"intruders of {each.name}",
        top=float(K),
        link=lambda site: row_id(report, index, site),
    )
    return join((summary, shown, _said(), left_out if skipped else None))


def spectra(report: Report, index: int) -> Html:
    """An adapter's singular values: all sites in one chart, and each in a table."""
    each = report.adapters[index]
    sites = [site for site in each.sites.values() if site.values]
    if not sites:
        return tag("p", "No spectrum could be computed.")
    return join((_spectrum_chart(each, sites), _sites_table(report, index)))


def _spectrum_chart(each: AdapterFigures, sites: Sequence[SiteFigures]) -> Html:
    longest = min(64, max(len(site.values) for site in sites))
    columns = [sorted(s.values[i] for s in sites if len(s.values) > i) for i in range(longest)]
    shares = (("largest", 1.0), ("median of the sites", 0.5), ("smallest", 0.0))
    series = [
        charts.Line(
            label,
            [(i + 1, column[round(share * (len(column) - 1))]) for i, column in enumerate(columns)],
            style,
        )
        for style, (label, share) in enumerate(shares)
    ]
    said = (
        f"Singular values of {each.name} at {len(sites)} sites: the median of the largest is "
        f"{figure(series[1].points[0][1])}, of the last {figure(series[1].points[-1][1])}"
    )
    drawn = charts.lines(series, x="number of the singular value", y="σ", label=said)
    caption = tag("figcaption", "Singular values of ΔW over all sites of ", name(each.name))
    return tag("figure", caption, charts.key(series), drawn)


def _sites_table(report: Report, index: int) -> Html:
    each = report.adapters[index]
    is_relative = report.base is not None
    columns = [
        ("site", "text"),
        ("rank", "number"),
        ("effective rank", "number"),
        ("‖ΔW‖", "number"),
        ("‖ΔW‖ / ‖W‖", "number"),
        ("largest σ", "number"),
        ("spectrum", ""),
    ]
    rows = []
    for site in each.sites.values():
        largest = site.values[0] if site.values else None
        cells = [
            tag("th", name(site.path), scope="row"),
            number(str(site.rank or "–"), site.rank),
            number(figure(site.effective_rank) if site.values else "–", site.effective_rank),
            number(figure(site.norm), site.norm),
            number(percent(site.relative), site.relative) if is_relative else None,
            number(figure(largest), largest),
            tag("td", charts.spectrum(site.values) if site.values else "–"),
        ]
        rows.append(tag("tr", cells, id=row_id(report, index, site), tabindex=-1))
    if not is_relative:
        columns = [c for c in columns if c[0] != "‖ΔW‖ / ‖W‖"]
    caption = join(("Every site of ", name(each.name)))
    found = table(caption, columns, rows, label=f"sites of {each.name}")
    return tag("details", tag("summary", f"The {len(each.sites)} sites, one by one"), found)


def budget(report: Report, index: int) -> Html:
    """Where an adapter's numbers are, and how much of its rank it uses."""
    each = report.adapters[index]
    groups: dict[str, list[SiteFigures]] = {}
    for site in each.sites.values():
        groups.setdefault(site.module, []).append(site)
    inside = sum(site.parameters for site in each.sites.values())
    rows = [_module_row(module, sites, each.parameters) for module, sites in groups.items()]
    rest = each.parameters - inside
    if rest:
        share = rest / each.parameters
        cells = [
            tag("th", "elsewhere (copies of modules, biases, tokens, …)", scope="row"),
            tag("td", ""),
            tag("td", ""),
            number(count(rest), rest),
            number(charts.bar(share, percent(share)), share),
            tag("td", ""),
        ]
        rows.append(tag("tr", cells))
    columns = [
        ("module", "text"),
        ("sites", "number"),
        ("rank", "number"),
        ("parameters", "number"),
        ("share", "number"),
        ("of the rank in use", "number"),
    ]
    caption = join(("Size and rank of ", name(each.name), " by module"))
    return table(caption, columns, rows, label=f"size of {each.name}")


def _module_row(module: str, sites: Sequence[SiteFigures], total: int) -> Html:
    numbers = sum(site.parameters for site in sites)
    share = numbers / total if total else 0.0
    given = sum(site.rank for site in sites)
    used = sum(site.effective_rank for site in sites if site.rank)
    use = used / given if given else None
    return tag(
        "tr",
        tag("th", name(module), scope="row"),
        number(str(len(sites)), len(sites)),
        number(ranks(sites), max(site.rank for site in sites)),
        number(count(numbers), numbers),
        number(charts.bar(share, percent(share)), share),
        number("–" if use is None else charts.bar(use, percent(use)), use),
    )


def left(each: AdapterFigures) -> Html | None:
    """What has no figures, and why."""
    if not each.left:
        return None
    by_reason: dict[str, list[str]] = {}
    for where, reason in each.left.items():
        by_reason.setdefault(reason, []).append(where)
    reasons = list(by_reason.items())
    items = [tag("li", _few(places), ": ", reason) for reason, places in reasons[:MOST_REASONS]]
    if len(reasons) > MOST_REASONS:
        items.append(tag("li", f"and for {len(reasons) - MOST_REASONS} more reasons"))
    return tag("div", tag("p", "Not among the figures:"), tag("ul", items), class_="left")


def _few(places: Sequence[str], limit: int = 4) -> str:
    more = f" and {len(places) - limit} more" if len(places) > limit else ""
    return f"{', '.join(places[:limit])}{more}"


def ranks(sites: Iterable[SiteFigures]) -> str:
    """The ranks of sites: one, or from … to …"""
    found = sorted({site.rank for site in sites if site.rank})
    if not found:
        return "–"
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def mean_rank(sites: Iterable[SiteFigures]) -> float | None:
    """The mean effective rank of the sites whose spectrum is known."""
    found = [site.effective_rank for site in sites if site.values]
    return sum(found) / len(found) if found else None


def row_id(report: Report, index: int, site: SiteFigures) -> str:
    """The id of a site's row in an adapter's table."""
    return f"a{index}-s{order(report.adapters[index].sites)[site.path]}"


def order(sites: Mapping[str, SiteFigures]) -> dict[str, int]:
    """The number of each site."""
    return {path: number for number, path in enumerate(sites)}


def _said() -> Html:
    return tag(
        "output",
        "Point at a cell, or move in the table with the arrow keys; Enter goes to the site.",
        class_="say",
        aria_live="polite",
    )
