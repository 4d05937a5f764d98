"""Whether a model keeps the laws: every check, and a report of what each found."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from multigraft.inspection.checks import CHECKS, Subject, Violation
from multigraft.inspection.structure import fold

_INDEX = re.compile(r"(^|\.)\d+(?=\.|$)")


@dataclass(frozen=True, repr=False)
class Report:
    """What was found; prints with repeats folded.

    Args:
        violations: breaches of a law.
        notes: what breaks nothing and is seldom meant.
    """

    violations: tuple[Violation, ...]
    notes: tuple[Violation, ...]

    @property
    def is_clean(self) -> bool:
        """Whether no law is broken; there may be notes."""
        return not self.violations

    def __str__(self) -> str:
        counts = [
            f"{len(found) or 'no'} {what}{'' if len(found) == 1 else 's'}"
            for found, what in ((self.violations, "violation"), (self.notes, "note"))
        ]
        found = [*lines(self.violations, ""), *lines(self.notes, "note: ")]
        return "\n".join([", ".join(counts), *found])

    __repr__ = __str__


def verify(model: nn.Module) -> Report:
    """Check that a model with adapters keeps the laws; it is not changed.

    Args:
        model: a `PeftModel`, a model that was adapted in place, or the same of PEFT's.
    """
    subject = Subject(model)
    found = [each for _, check in CHECKS.items() for each in check(subject)]
    return Report(
        violations=tuple(v for v in found if not v.is_note),
        notes=tuple(v for v in found if v.is_note),
    )


def lines(found: tuple[Violation, ...], prefix: str) -> Iterator[str]:
    """A text for each group of findings that differ in an index of their path alone."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for each in found:
        shape = _INDEX.sub(r"\1*", each.path)
        key = (shape, each.law, each.problem, each.remedy)
        alike.setdefault(key, []).append(each.path)
    for (_, law, problem, remedy), paths in alike.items():
        yield f"\n{prefix}{law} at {fold(paths) or 'the model'}\n  {problem}\n  {remedy}"
