"""Checks of the laws: one file for each group of them. They run in the order of the import."""

from multigraft.inspection.checks import nesting, coverage, sharing, state, values  # noqa: I001
from multigraft.inspection.checks.contract import CHECKS, Check, Subject, Violation, check

__all__ = [
    "CHECKS",
    "Check",
    "Subject",
    "Violation",
    "check",
    "coverage",
    "nesting",
    "sharing",
    "state",
    "values",
]
