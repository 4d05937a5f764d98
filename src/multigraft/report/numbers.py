"""Numbers as a reader takes them in at a glance."""

from __future__ import annotations

import math


def figure(value: float | None) -> str:
    """Three digits; a dash for what is not known."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.3g}"


def percent(share: float | None) -> str:
    """A share in per cent, in two or three digits."""
    if share is None:
        return "–"
    if not math.isfinite(share):
        return "not finite"
    value = 100 * share
    return f"{value:.0f} %" if value >= 100 else f"{value:.2g} %"


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


def rounded(top: float) -> float:
    """The next of 1, 2, 2.5 and 5 times a power of ten: where an axis ends."""
    if not top > 0 or not math.isfinite(top):
        return 1.0
    power = 10.0 ** math.floor(math.log10(top))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= top * (1 - 1e-9))
