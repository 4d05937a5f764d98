"""The whole page: one file, with its own style and script, that fetches nothing.

Names come from files that anybody may have made. They are escaped wherever they stand
(`multigraft.report.markup`), and the page's own policy lets no script run but the one in here.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from multigraft.report import charts, heat, sections
from multigraft.report.collect import Report
from multigraft.report.curves import Curve
from multigraft.report.intruders import EPSILON, K
from multigraft.report.markup import Html, join, name, tag
from multigraft.report.numbers import closeness, figure, percent
from multigraft.report.similarity import Similarity

_HERE = Path(__file__).parent


def page(report: Report) -> str:
    """The report as HTML."""
    style = Html((_HERE / "style.css").read_text(encoding="utf-8"))
    script = Html((_HERE / "script.js").read_text(encoding="utf-8"))
    parts = [(id_, title, body) for id_, title, body in _parts(report) if body is not None]
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}"
    )
    names = ", ".join(each.name for each in report.adapters[:3])
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", f"Adapters: {names}"),
        tag("style", style),
    )
    links = [tag("li", tag("a", title, href=f"#{id_}")) for id_, title, _ in parts]
    body = tag(
        "body",
        tag("a", "Skip to the figures", href="#overview", class_="skip"),
        tag("header", _heading(report), tag("nav", tag("ul", links), aria_label="parts")),
        _switch(report),
        tag("main", (_section(id_, title, content) for id_, title, content in parts)),
        tag("footer", _footer(report)),
        tag("script", script),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _parts(report: Report) -> list[tuple[str, str, Html | None]]:
    has_base = report.base is not None
    return [
        ("overview", "Overview", sections.overview(report)),
        ("size", "How strong, and where", _norms(report)),
        ("spectra", "Spectra", _each(report, lambda i: sections.spectra(report, i))),
        ("similarity", "Similarity", _similarity(report)),
        ("intruders", "Intruder dimensions", _intruders(report) if has_base else None),
        ("budget", "Size and rank", _each(report, lambda i: sections.budget(report, i))),
        ("training", "Training", _training(report)),
    ]


def _section(id_: str, title: str, body: Html | None) -> Html:
    return tag(
        "section", tag("h2", title, id=f"{id_}-title"), body, id=id_, aria_labelledby=f"{id_}-title"
    )


def _heading(report: Report) -> Html:
    adapters = len(report.adapters)
    count = f"{adapters} adapter{'' if adapters == 1 else 's'}"
    said = (
        tag("p", f"{count}, beside the weights of ", name(report.base), ".")
        if report.base is not None
        else tag("p", f"{count}. Without their base's weights, norms are absolute.")
    )
    return join((tag("h1", "Adapter report"), said))


def _switch(report: Report) -> Html | None:
    """Which adapter is shown; the script unhides it, and without one all are."""
    if len(report.adapters) == 1:
        return None
    options = [
        tag("option", each.name, value=number) for number, each in enumerate(report.adapters)
    ]
    everything = tag("option", "all of them", value="all", selected=True)
    return tag(
        "div",
        tag("label", "Show ", tag("select", everything, options, id="adapter")),
        class_="switch",
        hidden=True,
    )


def _each(report: Report, draw: Callable[[int], Html | None]) -> Html:
    """A block for each adapter."""
    return join(
        tag(
            "div",
            tag("h3", name(each.name)) if len(report.adapters) > 1 else None,
            draw(number),
            data_adapter=number,
        )
        for number, each in enumerate(report.adapters)
    )


def _norms(report: Report) -> Html:
    found = [
        heat.together(sites)[0] if report.base is None else sections.strength(sites) or 0.0
        for each in report.adapters
        for sites in heat.by_place(each.sites.values()).values()
    ]
    top = max((value for value in found if value < float("inf")), default=1.0)
    return _each(
        report,
        lambda i: join((sections.norms(report, i, top), sections.left(report.adapters[i]))),
    )


def _intruders(report: Report) -> Html:
    said = tag(
        "p",
        f"A direction of W + ΔW, among its {K} strongest, that is like none of W's own: the cosine "
        f"with each of them is below {EPSILON}. Many of them go along with forgetting ",
        tag("span", "(arXiv:2410.21228)."),
    )
    return join((said, _each(report, lambda i: sections.intruders(report, i))))


def _similarity(report: Report) -> Html | None:
    if not report.similarities:
        return None
    said = tag(
        "p",
        "The overlap of two adapters' directions is 1 where the smaller one's lie within the "
        "larger's, and about the figure for chance where they have nothing to do with each other. "
        "The cosine is that of the changes themselves. Adapters that began with the same seed read "
        "much the same inputs, since training moves these the least.",
    )
    columns = [
        ("adapter", "text"),
        ("and", "text"),
        ("sites in common", "number"),
        ("overlap of outputs", "number"),
        ("by chance", "number"),
        ("overlap of inputs", "number"),
        ("cosine of ΔW", "number"),
    ]
    rows = [_pair(each) for each in report.similarities]
    found = sections.table("Similarity of each two adapters", columns, rows, label="similarity")
    matrix = _matrix(report) if len(report.adapters) > 2 else None
    return join((said, matrix, found))


def _pair(each: Similarity) -> Html:
    def share(value: float | None) -> Html:
        drawn = "–" if value is None else charts.bar(abs(value), closeness(value))
        return sections.number(drawn, value)

    return tag(
        "tr",
        tag("th", name(each.first), scope="row"),
        tag("td", name(each.second)),
        sections.number(str(each.sites), each.sites),
        share(each.output),
        sections.number(percent(each.chance), each.chance),
        share(each.input),
        share(each.cosine),
    )


def _matrix(report: Report) -> Html:
    """The overlaps of outputs as a table of adapters by adapters."""
    known = {(each.first, each.second): each.output for each in report.similarities}
    names = [each.name for each in report.adapters]

    def cell(a: str, b: str) -> Html:
        value = 1.0 if a == b else known.get((a, b), known.get((b, a)))
        level = 0 if value is None else round((heat.LEVELS - 1) * value)
        return tag("td", closeness(value), class_=f"l{level}")

    head = tag("tr", tag("th", "adapter", scope="col"), (_column(n) for n in names))
    rows = [tag("tr", tag("th", name(a), scope="row"), (cell(a, b) for b in names)) for a in names]
    caption = tag("caption", "Overlap of outputs")
    body = tag("table", caption, tag("thead", head), tag("tbody", rows), class_="heat")
    return tag("div", body, class_="scroll", role="region", aria_label="overlaps", tabindex=0)


def _column(text: str) -> Html:
    return tag("th", name(text), scope="col")


def _training(report: Report) -> Html | None:
    curves = [curve for each in report.adapters for curve in each.curves if curve.points]
    if not curves:
        return None
    series = [charts.Line(c.adapter, c.points, number) for number, c in enumerate(curves)]
    said = "; ".join(
        f"{c.adapter}: {figure(c.points[0][1])} at step {c.points[0][0]}, "
        f"{figure(c.points[-1][1])} at step {c.points[-1][0]}"
        for c in curves
    )
    drawn = charts.lines(series, x="step", y="loss", label=f"Training loss. {said}")
    caption = tag("figcaption", "Loss in training")
    return join((tag("figure", caption, charts.key(series), drawn), _losses(curves)))


def _losses(curves: Sequence[Curve]) -> Html:
    """The points behind the chart, thinned out to what one reads."""
    rows = []
    for curve in curves:
        shown = [*curve.points[:: max(1, len(curve.points) // 20)]]
        shown += [curve.points[-1]] if shown[-1] != curve.points[-1] else []
        for step, loss in shown:
            cells = [
                tag("th", name(curve.adapter), scope="row"),
                sections.number(f"{step:,}", step),
            ]
            rows.append(tag("tr", cells, sections.number(figure(loss), loss)))
    columns = [("adapter", "text"), ("step", "number"), ("loss", "number")]
    found = sections.table("Loss in training, thinned out", columns, rows, label="losses")
    return tag("details", tag("summary", "The same as a table"), found)


def _footer(report: Report) -> Html:
    said = [
        "ΔW is what an adapter adds to a weight W; ‖·‖ is the Frobenius norm. The effective rank "
        "is exp of the entropy of the singular values as shares of their sum: as many as the rank "
        "where all are equal, 1 where one is all there is.",
        "The shades of the heat maps are the same for all adapters.",
    ]
    return join(tag("p", text) for text in said)


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
