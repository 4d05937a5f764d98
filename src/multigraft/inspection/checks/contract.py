"""What a check is: a function of the model as it was found, which yields what is wrong there.

A new one is a function under ``@check`` in a file of this folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from multigraft.inspection.places import Part, Place, base_view, handles, places, root_of
from multigraft.layer import AdaptedLayer
from multigraft.registry import Registry
from multigraft.roster import Roster


@dataclass(frozen=True)
class Violation:
    """One breach of a law.

    Args:
        law: the check that found it.
        path: where, in the model that was given.
        problem: what is there; the same words for the same breach elsewhere.
        remedy: what to do.
        is_note: nothing is broken, but it is seldom meant.
    """

    law: str
    path: str
    problem: str
    remedy: str
    is_note: bool = False


class Subject:
    """A model as the checks see it: each thing is found once, when first asked for.

    Args:
        model: as the user gave it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.base, self.base_path = root_of(model)
        self.outermost = places(model)
        self.places = [place for outer in self.outermost for place in outer.all()]

    @cached_property
    def parts(self) -> list[tuple[Place, Part]]:
        """Every adapter at every place."""
        return [(place, part) for place in self.places for part in place.parts]

    @property
    def roster(self) -> Roster | None:
        """Ours, if any of the adapters are."""
        layers = (p.layer for p in self.places)
        return next((x.roster for x in layers if isinstance(x, AdaptedLayer)), None)

    @property
    def foreign_configs(self) -> dict[str, Any]:
        """PEFT's configs by adapter, read by attribute; none of ours."""
        held = (getattr(model, "peft_config", None) for _, model in handles(self.model))
        found = next((configs for configs in held if configs), None)
        is_foreign = any(not place.is_ours for place in self.places)
        return found if is_foreign and isinstance(found, dict) else {}

    @cached_property
    def base_modules(self) -> list[tuple[str, nn.Module, nn.Module | None]]:
        """Base path, module and wrapper, for every way that leads to a module of the base."""
        return list(base_view(self.base, ""))

    def at(self, site: str) -> str:
        """A base path as a path in the model that was given."""
        return ".".join(part for part in (self.base_path, site) if part)


Check = Callable[[Subject], Iterator[Violation]]
CHECKS: Registry[Check] = Registry("check")
"""Checks by the law that they hold a model to, in the order in which they run."""


def check(law: str) -> Callable[[Check], Check]:
    """Decorator: run this function whenever a model is verified."""

    def add(function: Check) -> Check:
        return CHECKS.register(law, function)

    return add
