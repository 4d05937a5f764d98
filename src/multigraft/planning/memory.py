"""What a training step takes: memory by part, the peak, and the largest batch that fits."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from multigraft.config import PeftConfig
from multigraft.distributed.replicas import owned_tensors
from multigraft.errors import ConfigError
from multigraft.planning import skeleton
from multigraft.planning.batch import largest_batch
from multigraft.planning.optimizers import maker
from multigraft.planning.parallel import Meter, divide
from multigraft.planning.request import Load, Request
from multigraft.planning.step import ADAPTERS, BASE, OPTIMIZER, Step, run_step
from multigraft.planning.traffic import Traffic

CONTEXT = 640 << 20
"""Bytes of a GPU that are nobody's tensors: the driver's context, and the libraries' workspaces."""
FRAGMENTS = 0.05
"""Share of what is not weights that a GPU's allocator may hold in pieces that nothing fits into."""


class Bench:
    """Runs steps of a request, in one model without memory.

    Raises:
        MultigraftError: whatever a run of it would be refused for.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.make = maker(request.optimizer)
        base = skeleton.bones(request.model, request.head)
        self.parameters = sum(p.numel() for p in base.parameters())
        _check_length(base, request.longest)
        skeleton.frozen_base(base, request.dtype, request.quantize, request.gradient_checkpointing)
        styles = divide(base, request.ranks) if request.ranks > 1 else {}
        self.base = base
        self.model = skeleton.adapted(base, {n: copy.copy(c) for n, c in request.adapters.items()})
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.meter = Meter(base, styles, request.ranks)

    def step(self, rows: int | None = None) -> Step:
        """A step with so many rows of each adapter, at the costliest of its forwards.

        Args:
            rows: those that are asked for, by default.
        """
        loads = self.request.loads(rows)
        found = [self._run(company) for company in skeleton.companies(self.model, loads)]
        flops = self.request.accumulate * sum(step.flops for step in found)
        return dataclasses.replace(max(found, key=lambda step: step.peak), flops=flops)

    def adapter_tensors(self) -> list[Tensor]:
        """Every tensor of every adapter."""
        return owned_tensors(self.model.roster)

    def _run(self, loads: Sequence[Load]) -> Step:
        request = self.request
        rows, tokens = sum(load.rows for load in loads), max(load.tokens for load in loads)
        batch = skeleton.arguments(self.base, rows, tokens)
        if len(loads) > 1:
            batch["adapter_names"] = [load.name for load in loads for _ in range(load.rows)]
        else:
            self.model.roster.set_active([loads[0].name])
        return run_step(
            self.model,
            self.trained,
            batch,
            skeleton.loss,
            self.make,
            device=request.device.partition(":")[0],
            accumulates=request.accumulate > 1,
        )


@dataclass(frozen=True)
class MemoryPlan:
    """A request and what it takes.

    Args:
        parts: bytes of each part at the moment when most is alive; see `step.PARTS`.
        kept: bytes that a forward pass leaves for the backward pass.
        parameters: of the base.
        trained: parameters that train.
        flops: floating-point operations of a step.
        traffic: what each rank sends others that have parts of its layers.
    """

    request: Request
    parts: Mapping[str, int]
    kept: int
    parameters: int
    trained: int
    flops: int
    traffic: Traffic
    bench: Bench = dataclasses.field(repr=False, compare=False)

    @property
    def peak(self) -> int:
        """The most bytes of tensors that are alive at once."""
        return sum(self.parts.values())

    @property
    def allowance(self) -> int:
        """An estimate of what a GPU needs besides tensors."""
        return allowance(self.request, self.peak, self.parts[BASE])

    @property
    def total(self) -> int:
        """Peak and allowance."""
        return self.peak + self.allowance

    @property
    def fits(self) -> bool | None:
        """Whether there is as much memory; None where nobody knows how much there is."""
        available = self.request.available
        return None if available is None else self.total <= available

    @cached_property
    def largest_batch(self) -> int | None:
        """The most rows of each adapter that fit; None where the memory is not known."""
        available = self.request.available
        if available is None:
            return None
        tensors = _for_tensors(self.request, available, self.parts[BASE])
        if sum(self.parts[part] for part in (BASE, ADAPTERS, OPTIMIZER)) > tensors:
            return 0
        return largest_batch(self.bench.step, tensors, self.request.most_rows)


def allowance(request: Request, peak: int, weights: int) -> int:
    """What is needed besides a peak of so many bytes, some of them weights."""
    if request.device == "cpu":
        return 0
    return CONTEXT + int(FRAGMENTS * (peak - weights))


def _for_tensors(request: Request, available: int, weights: int) -> int:
    """The largest peak that leaves room for its allowance."""
    if request.device == "cpu":
        return available
    return int((available - CONTEXT + FRAGMENTS * weights) / (1 + FRAGMENTS))


def plan(model: Any, adapters: PeftConfig | Mapping[str, PeftConfig], **options: Any) -> MemoryPlan:
    """What a training step of these adapters on this model takes, without the model's weights.

    Args:
        model: a directory, an id on the hub, a config of transformers, or a model.
        adapters: one config, or several by name that learn side by side.
        options: further fields of `Request`.

    Raises:
        CheckpointError: no model can be made of ``model``.
        ConfigError: a value is outside what it allows.
        TargetError: an adapter does not fit the model.
        UnsupportedError: the model's forward depends on its values.
    """
    named = adapters if isinstance(adapters, Mapping) else {"default": adapters}
    return planned(Request(model, dict(named), **options))


def planned(request: Request) -> MemoryPlan:
    """The plan of a request; see `plan`."""
    bench = Bench(request)
    step = bench.step()
    return MemoryPlan(
        request,
        step.at_peak(),
        step.kept,
        bench.parameters,
        sum(p.numel() for p in bench.trained),
        step.flops,
        bench.meter.of_step(request.accumulate),
        bench,
    )


def _check_length(base: nn.Module, longest: int) -> None:
    limit = getattr(getattr(base, "config", None), "max_position_embeddings", None)
    if limit and longest > limit:
        raise ConfigError(f"`max_length` (={longest}) is more than the model takes ({limit}).")
