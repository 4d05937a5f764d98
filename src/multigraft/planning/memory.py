"""What a training step takes: memory by part, the peak, and the largest batch that fits."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from multigraft.config import PeftConfig
from multigraft.distributed.replicas import owned_tensors
from multigraft.errors import ConfigError, did_you_mean
from multigraft.planning import skeleton
from multigraft.planning.batch import largest_batch
from multigraft.planning.optimizers import maker
from multigraft.planning.parallel import Meter, divide
from multigraft.planning.sizes import bytes_of, memory_here
from multigraft.planning.step import ADAPTERS, BASE, OPTIMIZER, Step, run_step
from multigraft.planning.traffic import Traffic

DEVICES = ("cuda", "cpu")
CONTEXT = 640 << 20
"""Bytes of a GPU that are nobody's tensors: the driver's context, and the libraries' workspaces."""
FRAGMENTS = 0.05
"""Share of what is not weights that a GPU's allocator may hold in pieces that nothing fits into."""


@dataclass(frozen=True)
class Request:
    """A training step on paper.

    Args:
        model: a directory, an id on the hub, a config of transformers, or a model.
        adapters: configs by name; all of them train in every step.
        batch_size: rows of each adapter.
        max_length: tokens of a row.
        dtype: of the base.
        quantize: None, ``"nf4"``, ``"fp4"`` or ``"int8"``.
        optimizer: its name in a run.
        gradient_checkpointing: blocks are computed again in the backward pass.
        accumulate: parts of a step that run one after another.
        device: whose kernels are counted with, ``"cuda"`` or ``"cpu"``.
        memory: bytes, or text such as ``"80GiB"``; the first GPU's by default.
        ranks: how many each layer is divided over, by tensor parallelism.
    """

    model: Any
    adapters: Mapping[str, PeftConfig]
    batch_size: int = 8
    max_length: int = 1024
    dtype: str = "auto"
    quantize: str | None = None
    optimizer: str = "adamw"
    gradient_checkpointing: bool = False
    accumulate: int = 1
    device: str = "cuda"
    memory: str | int | None = None
    ranks: int = 1

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_length", "accumulate", "ranks"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"`{name}` (={value!r}) must be an integer of at least 1.")
        if self.device.partition(":")[0] not in DEVICES:
            raise ConfigError(
                f"`device` (={self.device!r}) must be one of {', '.join(DEVICES)}."
                f"{did_you_mean(self.device, DEVICES)}"
            )
        if self.memory is not None:
            bytes_of(self.memory)

    @property
    def available(self) -> int | None:
        """Bytes that there are, if anybody knows."""
        if self.memory is not None:
            return bytes_of(self.memory)
        return None if self.device == "cpu" else memory_here()

    def but(self, **changes: Any) -> Request:
        """The same with other values."""
        return dataclasses.replace(self, **changes)


class Bench:
    """Runs steps of a request, in one model without memory.

    Raises:
        MultigraftError: whatever a run of it would be refused for.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.make = maker(request.optimizer)
        base = skeleton.bones(request.model)
        self.parameters = sum(p.numel() for p in base.parameters())
        self._check_length(base)
        skeleton.frozen_base(base, request.dtype, request.quantize, request.gradient_checkpointing)
        styles = divide(base, request.ranks) if request.ranks > 1 else {}
        self.base = base
        self.model = skeleton.adapted(base, {n: copy.copy(c) for n, c in request.adapters.items()})
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.meter = Meter(base, styles, request.ranks)

    def step(self, rows: int) -> Step:
        """A step with so many rows of each adapter, at the costliest of its forwards."""
        companies = skeleton.companies(self.model, list(self.request.adapters))
        found = [self._run(names, rows) for names in companies]
        flops = self.request.accumulate * sum(step.flops for step in found)
        return dataclasses.replace(max(found, key=lambda step: step.peak), flops=flops)

    def adapter_tensors(self) -> list[Tensor]:
        """Every tensor of every adapter."""
        return owned_tensors(self.model.roster)

    def _run(self, names: list[str], rows: int) -> Step:
        request = self.request
        batch = skeleton.arguments(self.base, rows * len(names), request.max_length)
        if len(names) > 1:
            batch["adapter_names"] = [name for name in names for _ in range(rows)]
        else:
            self.model.roster.set_active(names)
        return run_step(
            self.model,
            self.trained,
            batch,
            skeleton.loss,
            self.make,
            device=request.device.partition(":")[0],
            accumulates=request.accumulate > 1,
        )

    def _check_length(self, base: nn.Module) -> None:
        limit = getattr(getattr(base, "config", None), "max_position_embeddings", None)
        if limit and self.request.max_length > limit:
            raise ConfigError(
                f"`max_length` (={self.request.max_length}) is more than the model takes ({limit})."
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
        return largest_batch(self.bench.step, tensors, self.request.batch_size)


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
    step = bench.step(request.batch_size)
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
