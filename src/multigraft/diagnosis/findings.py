"""What the doctor finds and does, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from multigraft.inspection.checks import Violation
from multigraft.inspection.verify import lines


@dataclass(frozen=True)
class Finding(Violation):
    """One thing that is wrong with an adapter's files.

    Args:
        law: the check that found it.
        path: a file, a key of the config, or a tensor.
        problem, remedy: what is there, and what to do.
        is_note: nothing is wrong, but it is seldom meant.
        is_fixable: ``fix=True`` (or, for a nest, ``un_nest=True``) puts it right.
    """

    is_fixable: bool = False


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """What was found in an adapter's files, and what was done; prints with repeats folded.

    Args:
        source: what was examined, or what was written in its place.
        findings: what is wrong there now.
        notes: what is not wrong, and seldom meant.
        done: what was changed, in order; empty when nothing was written.
    """

    source: str
    findings: tuple[Finding, ...]
    notes: tuple[Finding, ...]
    done: tuple[str, ...] = ()

    @property
    def is_healthy(self) -> bool:
        """Whether nothing is wrong; there may be notes."""
        return not self.findings

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "source": self.source,
            "is_healthy": self.is_healthy,
            "findings": [_plain(each) for each in self.findings],
            "notes": [_plain(each) for each in self.notes],
            "done": list(self.done),
        }

    def __str__(self) -> str:
        counts = [
            f"{len(found) or 'no'} {what}{'' if len(found) == 1 else 's'}"
            for found, what in ((self.findings, "finding"), (self.notes, "note"))
        ]
        done = [f"done: {each}" for each in self.done]
        found = [*lines(self.findings, ""), *lines(self.notes, "note: ")]
        return "\n".join([*done, f"{self.source}: {', '.join(counts)}", *found])

    __repr__ = __str__


def counted(count: int, what: str) -> str:
    """``1 site``, ``2 sites``."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _plain(finding: Finding) -> dict[str, Any]:
    return {
        "check": finding.law,
        "path": finding.path,
        "what": finding.problem,
        "remedy": finding.remedy,
        "is_fixable": finding.is_fixable,
    }
