"""Numbers as a reader takes them in at a glance."""

from __future__ import annotations

import math

_ENDS = (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10)


def figure(value: float | None) -> str:
    """Three digits; a dash for what is not known."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not finite"
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.3g}"
    return _digits(value, 3)


def percent(share: float | None) -> str:
    """A share in per cent, in two or three digits."""
    if share is None:
        return "–"
    if not math.isfinite(share):
        return "not finite"
    value = 100 * share
    return f"{value:,.0f} %" if value >= 100 else f"{_digits(value, 2)} %"


def closeness(value: float | None) -> str:
    """A cosine or an overlap, in hundredths."""
    return "–" if value is None else f"{round(value, 2) + 0.0:.2f}"


def count(value: int) -> str:
    """Exact up to a hundred thousand, then 1.2 M and 3.4 G."""
    for size, unit in ((10**9, "G"), (10**6, "M")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,}"


def size(value: int) -> str:
    """Bytes as KiB, MiB or GiB."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if value >= 1 << power:
            return f"{value / (1 << power):.3g} {unit}"
    return f"{value} B"


def whole_steps(first: int, last: int, most: int = 8) -> list[int]:
    """Whole numbers, evenly spaced, from the first to at most the last."""
    step = max(1, math.ceil((last - first) / most))
    power: int = 10 ** (len(str(step)) - 1)
    step = next(n * power for n in (1, 2, 5, 10) if n * power >= step)
    start = first if step == 1 else math.ceil(first / step) * step
    return list(range(start, last + 1, step))


def rounded(top: float) -> float:
    """Where an axis ends whose quarters are to be short numbers."""
    if not top > 0 or not math.isfinite(top):
        return 1.0
    power = 10.0 ** math.floor(math.log10(top))
    return next(step * power for step in _ENDS if step * power >= top * (1 - 1e-9))


def _digits(value: float, digits: int) -> str:
    """So many digits, zeros at the end included, and no more than are there."""
    return "0" if value == 0 else f"{value:#.{digits}g}".rstrip(".")
