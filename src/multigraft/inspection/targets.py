"""A dry run: which modules a config means on a model, why, and what an adapter there would take.

The verdicts are those of `multigraft.targeting`, and the sites and shapes those of
`multigraft.prepare`: what attaching goes by. Nothing is decided here, only put into words.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from multigraft.config import PeftConfig, TargetedConfig
from multigraft.defaults import TASK_HEADS, save_task_heads
from multigraft.errors import MultigraftError, TargetError
from multigraft.graft import Graft
from multigraft.inspection.structure import fold
from multigraft.inspection.target_words import Words
from multigraft.methods import METHODS
from multigraft.needs import module_needs
from multigraft.prepare import Prepared, own_copy, prepare
from multigraft.prompts import CONTEXTS
from multigraft.sites import verdicts
from multigraft.storage import holder, parameter_counts, storage_of
from multigraft.survey import Spot, survey
from multigraft.targeting import Outcome, Verdict
from multigraft.tuner import base_of

if TYPE_CHECKING:
    from rich.console import RenderableType

_INDEX = re.compile(r"(^|\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class TargetPart:
    """What an adapter would have at one module.

    Args:
        method: the method's ``peft_type``.
        tensor: which tensor of the module it would change.
        rank: 0 for methods without one.
        parameters: how many numbers it would train there.
    """

    method: str
    tensor: str
    rank: int
    parameters: int


@dataclass(frozen=True)
class Target:
    """One module of the base, and what is decided on it.

    Args:
        reason: why it is meant, or why it is not.
        holds_tensors: whether it has parameters itself, rather than modules that do.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    is_chosen: bool
    reason: str
    holds_tensors: bool
    parts: tuple[TargetPart, ...] = ()

    @property
    def parameters(self) -> int:
        """How many numbers the adapter would train here."""
        return sum(part.parameters for part in self.parts)


@dataclass(frozen=True)
class TargetGroup:
    """Modules that differ in an index of their path alone; `parameters` is summed over them."""

    pattern: str
    first: Target
    modules: tuple[Target, ...]

    @property
    def parameters(self) -> int:
        """How many numbers the adapter would train in all of them."""
        return sum(target.parameters for target in self.modules)


@dataclass(frozen=True, repr=False)
class TargetPlan:
    """What a config means on a model; prints as a table.

    Args:
        base: class of the base model.
        method: the config's ``peft_type``.
        modules: every module of the base, in its order.
        problems: why the config cannot be attached; empty when it can.
        notes: warnings that attaching would give.
        elsewhere: numbers to train that belong to no module: shared ones, or the context's.
    """

    base: str
    base_parameters: int
    method: str
    modules: tuple[Target, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()
    elsewhere: int = 0

    @property
    def fits(self) -> bool:
        """Whether the config can be attached as it is."""
        return not self.problems

    @property
    def chosen(self) -> tuple[Target, ...]:
        """The modules at which the adapter would act."""
        return tuple(target for target in self.modules if target.is_chosen)

    @property
    def parameters(self) -> int:
        """How many numbers the adapter would train."""
        return self.elsewhere + sum(target.parameters for target in self.modules)

    @property
    def groups(self) -> tuple[TargetGroup, ...]:
        """The modules with repeats folded: alike in everything but indices of the path."""
        found: dict[tuple, list[Target]] = {}
        for target in self.modules:
            found.setdefault(
                (_INDEX.sub(r"\1*", target.path), replace(target, path="")), []
            ).append(target)
        return tuple(
            TargetGroup(fold([t.path for t in alike]), alike[0], tuple(alike))
            for alike in found.values()
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {**asdict(self), "fits": self.fits, "parameters": self.parameters}

    def __str__(self) -> str:
        from multigraft.inspection.target_table import text

        return text(self)

    __repr__ = __str__

    def __rich__(self) -> RenderableType:
        """What rich prints: the same table, with its styles."""
        from multigraft.inspection.target_table import rich_table

        return rich_table(self)


def targets(model: nn.Module, config: PeftConfig) -> TargetPlan:
    """What ``config`` means on ``model``, without attaching anything; both stay as they are.

    As with `get_peft_model`, a classifier's adapter trains a copy of the head as well.

    Args:
        model: a base model, on whatever device (the meta device will do), or a `PeftModel`.

    Raises:
        UnsupportedError: the config is none of ours.
        NestingError: the model carries adapters of another library.
    """
    base, config = base_of(model), own_copy(config)
    usual = TASK_HEADS.get(str(config.task_type), ())
    save_task_heads(config, base, getattr(model, "default_saved_modules", usual))
    spots = survey(base)
    prepared, problems, notes = _attempt(base, config)
    found = _decisions(base, own_copy(config), spots)
    parts = _parts(prepared) if prepared is not None else {}
    words = Words(config, spots)
    modules = tuple(
        _target(spot, words, found[n] if found else None, parts.get(spot.path, ()), bool(problems))
        for n, spot in enumerate(spots)
    )
    return TargetPlan(
        base=type(base).__name__,
        base_parameters=sum(count for _, count in parameter_counts(base)),
        method=str(config.peft_type),
        modules=modules,
        problems=tuple(problems),
        notes=tuple(notes),
        elsewhere=_elsewhere(prepared) if prepared is not None else 0,
    )


def _attempt(base: nn.Module, config: PeftConfig) -> tuple[Prepared | None, list[str], list[str]]:
    """What attaching would begin with, or why it would refuse; and what it would warn of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            prepared, problems = prepare(base, "dry run", config), []
        except MultigraftError as error:
            prepared, problems = None, [str(error)]
    return prepared, problems, list(dict.fromkeys(str(each.message) for each in caught))


def _decisions(base: nn.Module, config: PeftConfig, spots: Sequence[Spot]) -> list[Verdict] | None:
    """A verdict for each module; None where the config has no targets, or decides nothing."""
    if not isinstance(config, TargetedConfig) or str(config.peft_type) in CONTEXTS:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            METHODS[str(config.peft_type)].complete(config, base)
            return verdicts(base, config, spots)
        except MultigraftError:
            return None  # a problem, and `_attempt` says which


def _parts(prepared: Prepared) -> dict[str, list[TargetPart]]:
    """What would be made at each module, by its path."""
    parts: dict[str, list[TargetPart]] = {}
    for need, method in prepared.parts:
        own = Graft(prepared.adapter, method).own_specs.values()
        trained = 0 if need.site.tied else sum(math.prod(s.shape) for s in own if _is_trained(s))
        part = TargetPart(need.method.name, need.site.tensor_name, method.rank, trained)
        parts.setdefault(need.spot.path, []).append(part)
    return parts


def _is_trained(spec: Any) -> bool:
    is_float = spec.dtype is None or spec.dtype.is_floating_point
    return spec.trainable and not spec.buffer and is_float


def _elsewhere(prepared: Prepared) -> int:
    context = prepared.grow_context({}, autocast=True, on_meta=True)
    if context is not None:
        return sum(p.numel() for p in context.parameters() if p.requires_grad)
    if prepared.main is None or not prepared.main_sites:
        return 0
    shared = prepared.main.shared_specs(prepared.config, prepared.main_sites).values()
    return sum(math.prod(spec.shape) for spec in shared if _is_trained(spec))


def _target(
    spot: Spot,
    words: Words,
    verdict: Verdict | None,
    parts: Sequence[TargetPart],
    is_refused: bool,
) -> Target:
    """One module, in words; where the whole config is refused, each that it means by itself."""
    is_chosen, reason = bool(parts), words.reason(spot, verdict, [p.method for p in parts])
    if verdict is not None and verdict.outcome is Outcome.CHOSEN and is_refused:
        refusal = _refusal(spot, words.config)
        is_chosen = refusal is None
        reason = f"{reason}, but {refusal}" if refusal else reason
    return Target(
        path=spot.path,
        kind=type(spot.layer).__name__,
        shape=_shape(spot.layer),
        is_chosen=is_chosen,
        reason=reason,
        holds_tensors=any(p is not None for p in spot.layer._parameters.values()),
        parts=tuple(parts),
    )


def _shape(layer: nn.Module) -> tuple[int, ...]:
    held = holder(layer)
    return tuple(storage_of(layer).shape(layer)) if held is not None else ()


def _refusal(spot: Spot, config: PeftConfig) -> str | None:
    """Why the method cannot act on a module that is meant, or None."""
    try:
        for need in module_needs(spot, METHODS[str(config.peft_type)]):
            need.method(need.site, config)
    except TargetError as error:
        return str(error).replace(spot.path, "it")
    return None
