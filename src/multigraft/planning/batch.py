"""The largest batch that fits, from two steps.

Every storage of a step is a constant plus so many bytes for each row, so two steps that differ in
their rows tell the bytes alive at each moment for any number of rows.
"""

from __future__ import annotations

from collections.abc import Callable

from multigraft.planning.step import Step

FEWEST = 2
"""Rows of the smaller step: with one, tensors may be views that otherwise are copies."""
MOST = 1 << 20
"""More rows are not looked for."""


def largest_batch(run: Callable[[int], Step], memory: int, rows: int) -> int:
    """How many rows fit into so many bytes; 0 if not even one does.

    Args:
        run: the step with so many rows.
        rows: about how many are expected.
    """
    first = max(FEWEST, rows)
    found = _solved(run(first), run(first + 1), first, memory)
    if found is None:
        found = _bisected(lambda n: run(n).peak <= memory)
    if found < FEWEST:
        return int(run(1).peak <= memory)
    return found


def _solved(less: Step, more: Step, rows: int, memory: int) -> int | None:
    """From two steps of so many rows and one more; None where they don't match event by event."""
    if [number for number, _ in less.events] != [number for number, _ in more.events]:
        return None
    found = MOST
    for a, b in zip(less.course, more.course, strict=True):
        each = b - a
        if each > 0:
            found = min(found, (memory - a) // each + rows)
        elif a > memory:
            return 0
    return max(0, found)


def _bisected(fits: Callable[[int], bool]) -> int:
    least, most = 0, 1
    while most < MOST and fits(most):
        least, most = most, 2 * most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    return least
