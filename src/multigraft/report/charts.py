"""Charts as SVG: lines over steps, spectra, bars. Each says in words what it shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from multigraft.report.markup import Html, join, tag
from multigraft.report.numbers import figure, rounded, whole_steps

WIDTH, HEIGHT = 720, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 26, 36
STYLES = 6
"""How many looks of a line there are, each with a colour, a dash and a mark of its own."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """A line of a chart, with its look: ``style`` counts from 0."""

    label: str
    points: Points
    style: int


def lines(series: Sequence[Line], *, x: str, y: str, label: str) -> Html:
    """Lines over a common pair of axes that begin at zero.

    Args:
        x, y: what the axes count.
        label: the whole chart in words.
    """
    values = [p for line in series for p in line.points]
    left, right = min(p[0] for p in values), max(p[0] for p in values)
    top = rounded(max(p[1] for p in values))
    span = (right - left) or 1.0

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return (
            LEFT + (point[0] - left) / span * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - max(0.0, min(1.0, point[1] / top)) * (HEIGHT - TOP - BOTTOM),
        )

    drawn = [_line(line, [place(p) for p in line.points]) for line in series]
    return tag(
        "svg",
        _grid(top),
        _ticks(left, right),
        tag("text", x, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 4, class_="axis middle"),
        tag("text", y, x=4, y=12, class_="axis"),
        drawn,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=label,
        class_="chart",
    )


def key(series: Sequence[Line]) -> Html:
    """What each look of a line stands for."""
    return tag(
        "ul",
        (
            tag(
                "li",
                tag(
                    "svg",
                    _line(Line("", (), line.style), [(2, 7), (18, 7), (34, 7)]),
                    viewBox="0 0 36 14",
                    class_="sample",
                    aria_hidden="true",
                ),
                tag("bdi", line.label),
            )
            for line in series
        ),
        class_="key",
    )


def spectrum(values: Sequence[float], *, bars: int = 32) -> Html:
    """Singular values as bars beside each other, relative to the largest."""
    shown, top = values[:bars], values[0] if values[0] > 0 else 1.0
    step = 120 / max(len(shown), 8)
    heights = [max(1.0, 24 * value / top) for value in shown]
    path = "".join(
        f"M{i * step:.1f},24v-{height:.1f}h{step * 0.8:.1f}V24z" for i, height in enumerate(heights)
    )
    return tag(
        "svg",
        tag("path", d=path),
        viewBox="0 0 120 24",
        role="img",
        aria_label=f"{len(values)} singular values: {figure(values[0])} to {figure(values[-1])}",
        class_="spark",
    )


def bar(share: float, words: str) -> Html:
    """One bar of a table, filled to ``share``, beside the words that say the same."""
    width = round(100 * max(0.0, min(1.0, share)), 2)
    return join(
        (
            tag(
                "svg",
                tag("rect", width=100, height=8, class_="track", rx=2),
                tag("rect", width=width, height=8, class_="fill", rx=2),
                viewBox="0 0 100 8",
                class_="bar",
                aria_hidden="true",
            ),
            tag("span", words, class_="figure"),
        )
    )


def _line(line: Line, places: Sequence[tuple[float, float]]) -> Html:
    style = f"line s{line.style % STYLES}"
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    marked = places if len(places) <= 12 else [*places[:: len(places) // 8], places[-1]]
    return tag(
        "g",
        tag("polyline", points=path, fill="none"),
        [_mark(line.style, x, y) for x, y in marked],
        class_=style,
    )


def _mark(style: int, x: float, y: float) -> Html:
    kind = (style + style // STYLES) % 3  # a second line of the same colour has another mark
    if kind == 0:
        return tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=3)
    if kind == 1:
        return tag("rect", x=f"{x - 3:.1f}", y=f"{y - 3:.1f}", width=6, height=6)
    return tag("path", d=f"M{x:.1f},{y - 4:.1f} l4,7 h-8 z")


def _grid(top: float) -> Html:
    parts = []
    for quarter in range(5):
        y = HEIGHT - BOTTOM - quarter / 4 * (HEIGHT - TOP - BOTTOM)
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        said = f"{top * quarter / 4:.4g}"
        parts.append(tag("text", said, x=LEFT - 6, y=y + 4, class_="tick end"))
    return join(parts)


def _ticks(left: float, right: float) -> Html:
    parts = []
    for value in whole_steps(round(left), round(right)):
        x = LEFT + (value - left) / ((right - left) or 1.0) * (WIDTH - LEFT - RIGHT)
        anchor = "end" if x > WIDTH - RIGHT - 12 else "middle"
        text = tag("text", f"{value:,}", x=f"{x:.1f}", y=HEIGHT - BOTTOM + 16)
        parts.append(tag("g", text, class_=f"tick {anchor}"))
    return join(parts)
