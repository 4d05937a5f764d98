"""Jobs of one adapter, from the fields of both."""

from __future__ import annotations

import dataclasses
from typing import Any

from multigraft.train import AdapterJob, Job, Outcome

OWN = {field.name for field in dataclasses.fields(AdapterJob)}


def one(**fields: Any) -> Job:
    """A job with a single adapter."""
    own = {name: value for name, value in fields.items() if name in OWN}
    rest = {name: value for name, value in fields.items() if name not in OWN}
    return Job(adapters=(AdapterJob(**own),), **rest)


def only(outcomes: list[Outcome]) -> Outcome:
    """The one outcome."""
    (outcome,) = outcomes
    return outcome
