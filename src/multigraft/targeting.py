"""Which modules ``target_modules`` means, and what decides on each: asked module by module.

`multigraft.sites` attaches at those that are chosen; a dry run shows the verdict on all of them.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import NamedTuple

from torch import nn

from multigraft.bases import geometry_of
from multigraft.config import TargetedConfig, TaskType
from multigraft.errors import MultigraftWarning, TargetError, listed, nearest_of, there_are
from multigraft.survey import Spot

HEAD_NAMES = ("score", "classifier")
"""Heads of sequence classifiers, which transformers initialises afresh."""
ALL_LINEAR = "all-linear"


class Outcome(Enum):
    """What is decided on one module."""

    CHOSEN = "chosen"
    UNNAMED = "no name or expression means it"
    NOT_LINEAR = "all-linear, and it is no linear layer"
    HEAD = "all-linear, and it is the output head"
    OTHER_LAYER = "layers_to_transform leaves its layer out"
    CLASH = "named in full, while layers_to_transform leaves its layer out"
    EXCLUDED = "exclude_modules"
    SAVED = "modules_to_save trains a copy of it"


class Verdict(NamedTuple):
    """An outcome, and the name or expression of the config that decided it."""

    outcome: Outcome
    by: str = ""


_UNNAMED = Verdict(Outcome.UNNAMED)
_NOT_LINEAR = Verdict(Outcome.NOT_LINEAR)
_HEAD = Verdict(Outcome.HEAD)
NOT_MEANT = frozenset({Outcome.UNNAMED, Outcome.NOT_LINEAR, Outcome.HEAD})
"""Outcomes of modules that ``target_modules`` does not mean in the first place."""


@dataclass(frozen=True, eq=False)
class Rule:
    """What a config says of its targets on one model.

    Args:
        model: the base model.
        config: the adapter's.
        wanted: `target_modules`, with None resolved to the architecture's usual ones.
        taken: identities of spots that the adapter copies whole.
        lenient: a full path passes whatever the layer's index, as PEFT's files have it.
    """

    model: nn.Module
    config: TargetedConfig
    wanted: list[str] | str
    taken: set[int]
    lenient: bool = False

    def verdicts(self, spots: Sequence[Spot]) -> list[Verdict]:
        """What is decided on each of the model's modules, in their order."""
        if self.wanted != ALL_LINEAR:
            return [self._named(spot) for spot in spots]
        head = output_head(self.model)
        is_classifier = head is None and self.config.task_type == TaskType.SEQ_CLS
        return [self._linear(spot, head, is_classifier) for spot in spots]

    def _named(self, spot: Spot) -> Verdict:
        by = _first_match(self.wanted, spot)
        if by is None:
            return _UNNAMED
        if not is_in_layers(self.config, spot):
            # PEFT lets a full path pass whatever the indices; its files keep that meaning.
            is_full = isinstance(self.wanted, list) and spot.path in self.wanted
            if not is_full:
                return Verdict(Outcome.OTHER_LAYER, by)
            if not self.lenient:
                return Verdict(Outcome.CLASH, by)
        return self._filtered(spot, by)

    def _linear(self, spot: Spot, head: nn.Module | None, is_classifier: bool) -> Verdict:
        geometry = geometry_of(spot.layer)
        if geometry is None or not geometry.is_linear:
            return _NOT_LINEAR
        if spot.layer is head or (is_classifier and spot.path in HEAD_NAMES):
            return _HEAD
        if not is_in_layers(self.config, spot):
            return Verdict(Outcome.OTHER_LAYER, ALL_LINEAR)
        return self._filtered(spot, ALL_LINEAR)

    def _filtered(self, spot: Spot, by: str) -> Verdict:
        """The verdict on a module that is meant, once exceptions have had their say."""
        excluded = self.config.exclude_modules
        exception = _first_match(excluded, spot) if excluded else None
        if exception is not None:
            return Verdict(Outcome.EXCLUDED, exception)
        return Verdict(Outcome.SAVED if id(spot) in self.taken else Outcome.CHOSEN, by)


def choose(rule: Rule, spots: Sequence[Spot], *, lenient: bool) -> list[Spot]:
    """The modules to adapt.

    Args:
        lenient: warn, rather than fail, about names that match nothing beside others that do.

    Raises:
        TargetError: nothing is left; a name or an index means nothing; two fields contradict.
    """
    config, wanted = rule.config, rule.wanted
    check_layers(config, spots, lenient)
    found = list(zip(spots, rule.verdicts(spots), strict=True))
    meant = [spot for spot, verdict in found if verdict.outcome not in NOT_MEANT]
    if wanted != ALL_LINEAR:
        check_names("target_modules", wanted, spots, meant, lenient)
    elif all(v.outcome in NOT_MEANT or v.outcome is Outcome.OTHER_LAYER for _, v in found):
        raise TargetError(
            f'`target_modules` (="all-linear"): {type(rule.model).__name__} has no linear layer '
            "besides its output head. Name the modules to adapt."
        )
    for spot, verdict in found:
        if verdict.outcome is Outcome.CLASH:
            raise TargetError(clash(config, spot.path))
    if config.exclude_modules:
        check_names("exclude_modules", config.exclude_modules, spots, spots, lenient)
    chosen = [spot for spot, verdict in found if verdict.outcome is Outcome.CHOSEN]
    if not chosen and wanted != []:
        raise TargetError(
            f"no module is left to adapt: `target_modules` (={config.target_modules!r}), "
            f"`exclude_modules` (={config.exclude_modules!r}), `layers_to_transform` "
            f"(={config.layers_to_transform!r}), `modules_to_save` (={config.modules_to_save!r}). "
            "Loosen one of them."
        )
    return chosen


def clash(config: TargetedConfig, path: str) -> str:
    """What is said of a module that is named in full and left out by its layer's index."""
    return (
        f"`target_modules` names {path} in full, but `layers_to_transform` "
        f"(={config.layers_to_transform!r}) leaves it out. Drop one of the two."
    )


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that turns a language model's states into scores of tokens, if it says which."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found: nn.Module | None = getattr(head, "base_layer", head)
    return found


def matches(wanted: list[str] | str, path: str) -> bool:
    """Whole-path regular expression for a string, dotted suffix for a list."""
    return matching(wanted, path) is not None


def matching(wanted: list[str] | str, path: str) -> str | None:
    """The expression, or the first name of the list, that means this path; or None."""
    if isinstance(wanted, str):
        return wanted if re.fullmatch(wanted, path) is not None else None
    return next((n for n in wanted if path == n or path.endswith(f".{n}")), None)


def check_names(
    field: str, wanted: list[str] | str, spots: Sequence[Spot], found: Sequence[Spot], lenient: bool
) -> None:
    """Fail for names, or an expression, that mean none of the modules ``found``.

    Raises:
        TargetError: with the nearest real names.
    """
    paths = [p for s in found for p in s.paths]
    if isinstance(wanted, str):
        if not any(matches(wanted, p) for p in paths):
            hint = there_are((s.path for s in spots if s.layer._parameters), limit=4)
            if any(matches([wanted], p) for s in spots for p in s.paths):
                hint = f" As a name it must stand in a list: {field}=[{wanted!r}]."
            raise TargetError(
                f"`{field}` (={wanted!r}): the expression matches no module's whole path.{hint}"
            )
        return
    missing = [name for name in wanted if not any(matches([name], p) for p in paths)]
    if not missing:
        return
    known = {p.rpartition(".")[2] for s in spots for p in s.paths} | {s.path for s in spots}
    usable = {s.path.rpartition(".")[2] for s in spots if s.layer._parameters}
    hints = nearest_of(missing, known) or there_are(usable)
    message = f"`{field}`: no module is called {listed(missing)}.{hints}"
    if lenient and len(missing) < len(wanted):
        warnings.warn(message, MultigraftWarning, stacklevel=2)
    else:
        raise TargetError(message)


def layer_index(config: TargetedConfig, path: str) -> int | None:
    """The index of the layer that a path lies in, by ``layers_pattern`` or the first number."""
    patterns = config.layers_pattern or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        match = _layer(pattern).match(path)
        if match:
            return int(match.group(1))
    return None


@lru_cache(1 << 16)
def _layer(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?:^|.*?\.)(?:{pattern})\.(\d+)\.")


def check_layers(config: TargetedConfig, spots: Sequence[Spot], lenient: bool) -> None:
    """Fail for layer indices that no layer of the model has.

    Raises:
        TargetError: with the indices that there are.
    """
    indices = config.layers_to_transform
    if indices is None or indices == []:
        return
    there = {i for s in spots for p in s.paths if (i := layer_index(config, p)) is not None}
    missing = sorted(({indices} if isinstance(indices, int) else set(indices)) - there)
    if not missing:
        return
    known = f"there are {min(there)} to {max(there)}" if there else "no layer has an index"
    message = f"`layers_to_transform` (={indices!r}): there are no layers {missing}; {known}"
    if config.layers_pattern:
        message += f" in `layers_pattern` (={config.layers_pattern!r})"
    if not lenient:
        raise TargetError(f"{message}. Give indices of the model's layers.")
    warnings.warn(f"{message}.", MultigraftWarning, stacklevel=2)


def is_in_layers(config: TargetedConfig, spot: Spot) -> bool:
    """Whether ``layers_to_transform`` lets this module in."""
    indices = config.layers_to_transform
    if indices is None or indices == []:
        return True
    allowed = {indices} if isinstance(indices, int) else set(indices)
    return layer_index(config, spot.path) in allowed


def _first_match(wanted: list[str] | str, spot: Spot) -> str | None:
    return next((by for path in spot.paths if (by := matching(wanted, path)) is not None), None)
