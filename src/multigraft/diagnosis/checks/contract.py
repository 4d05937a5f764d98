"""What a check of files is: a function of the patient that yields what is wrong there.

A new one is a function under ``@check`` in a file of this folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from multigraft.diagnosis.findings import Finding
from multigraft.diagnosis.patient import Patient
from multigraft.registry import Registry

Check = Callable[[Patient], Iterator[Finding]]
CHECKS: Registry[Check] = Registry("check of files")
"""Checks by name, in the order in which they run."""


def check(name: str) -> Callable[[Check], Check]:
    """Decorator: run this function on every adapter that is examined."""

    def add(function: Check) -> Check:
        return CHECKS.register(name, function)

    return add
