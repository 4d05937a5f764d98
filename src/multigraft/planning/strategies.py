"""What each rank holds and sends under a strategy: one function each.

The rows are each rank's own, but for tensor parallelism, whose ranks see the same ones. Bytes of
ddp, fsdp and tp are held to what two real ranks hold and send, by a test; those of zero3 follow
from DeepSpeed's documentation and are not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from multigraft.distributed.fsdp import blocks_of
from multigraft.errors import ConfigError
from multigraft.planning.memory import Bench, MemoryPlan, planned
from multigraft.planning.request import Request
from multigraft.planning.step import ADAPTERS, BASE, GRADIENTS, OPTIMIZER
from multigraft.planning.traffic import Traffic
from multigraft.registry import Registry

GATHERED = "gathered weights"
BLOCKS = 3
"""Blocks of FSDP2 that are whole at once: the one that runs, and the next one twice, as it comes
in and as it is laid out."""
LIVE = 1_000_000_000
"""Parameters that ZeRO-3 keeps whole at most, by default (`stage3_max_live_parameters`)."""


@dataclass(frozen=True)
class OfRank:
    """One rank's step.

    Args:
        parts: bytes at the peak, by part.
        traffic: of a step.
        plan: of the step that each rank runs.
        copies: how many ranks see rows of their own.
        measured: whether a test compares its bytes with real ranks'.
    """

    parts: Mapping[str, int]
    traffic: Traffic
    plan: MemoryPlan
    copies: int
    measured: bool = True


Planner = Callable[[Request], MemoryPlan]
Strategy = Callable[[Request, int, Planner], OfRank]
STRATEGIES: Registry[Strategy] = Registry("strategy")


def ddp(request: Request, gpus: int, plan_of: Planner = planned) -> OfRank:
    """The whole model on each rank; one all-reduce of the adapters' gradients a step."""
    plan = plan_of(request)
    traffic = Traffic(all_reduce=_bytes(plan.bench.trained))
    return OfRank(plan.parts, traffic, plan, gpus)


def fsdp(request: Request, gpus: int, plan_of: Planner = planned) -> OfRank:
    """A part of the base on each rank, gathered block by block; whole adapters, as in `ddp`.

    Raises:
        ConfigError: the base is quantised, which FSDP2 does not divide.
    """
    _refuse_packed(request, "fsdp")
    plan = plan_of(request)
    root, *blocks = groups(plan.bench)
    whole = [sum(padded(tensor, gpus) for tensor in group) for group in (root, *blocks)]
    # Each group twice, forwards and backwards: for every part of a step.
    traffic = Traffic(all_gather=2 * sum(whole)).times(request.accumulate)
    traffic = traffic + Traffic(all_reduce=_bytes(plan.bench.trained))
    parts = dict(plan.parts)
    parts[BASE] += sum(whole) // gpus - sum(_bytes(group) for group in (root, *blocks))
    parts[GATHERED] = whole[0] + BLOCKS * max(whole[1:], default=0)
    return OfRank(parts, traffic, plan, gpus)


def tp(request: Request, gpus: int, plan_of: Planner = planned) -> OfRank:
    """A part of every layer on each rank, which all see the same rows.

    Raises:
        ConfigError: the layers cannot be divided by so many ranks.
        UnsupportedError: the model says nothing of how it is divided.
    """
    _refuse_packed(request, "tp")
    plan = plan_of(request.but(ranks=gpus))
    return OfRank(plan.parts, plan.traffic, plan, 1)


def zero3(request: Request, gpus: int, plan_of: Planner = planned) -> OfRank:
    """DeepSpeed's ZeRO-3: a part of every tensor on each rank, adapters and their state as well."""
    _refuse_packed(request, "zero3")
    plan = plan_of(request)
    root, *blocks = groups(plan.bench)
    frozen = [tensor for group in (root, *blocks) for tensor in group]
    everything = [*frozen, *plan.bench.trained]
    gathered = Traffic(all_gather=2 * _bytes(everything)).times(request.accumulate)
    reduced = Traffic(reduce_scatter=_bytes(plan.bench.trained)).times(request.accumulate)
    parts = dict(plan.parts)
    parts[BASE] += _bytes(frozen) // gpus - _bytes(frozen)
    for part in (ADAPTERS, OPTIMIZER, GRADIENTS):
        parts[part] = -(-parts[part] // gpus)
    each = _bytes(everything) / max(1, sum(tensor.numel() for tensor in everything))
    parts[GATHERED] = int(min(LIVE * each, _bytes(everything)))
    return OfRank(parts, gathered + reduced, plan, gpus, measured=False)


def groups(bench: Bench) -> list[list[Tensor]]:
    """The base's tensors as FSDP2 gathers them: what belongs to no block, then each block's."""
    adapters = {id(tensor) for tensor in bench.adapter_tensors()}
    seen = set(adapters)
    blocks = [_own(block, seen) for block in blocks_of(bench.base)]
    return [_own(bench.base, seen), *blocks]


def padded(tensor: Tensor, ranks: int) -> int:
    """Bytes of a tensor that is divided over its first axis, with what fills it up."""
    length = tensor.shape[0] if tensor.dim() else 1
    each = tensor.nbytes // max(1, length)
    return -(-length // ranks) * ranks * each


def _own(module: nn.Module, seen: set[int]) -> list[Tensor]:
    found = [parameter for parameter in module.parameters() if id(parameter) not in seen]
    seen.update(map(id, found))
    return list(found)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _refuse_packed(request: Request, strategy: str) -> None:
    if request.quantize is not None:
        raise ConfigError(
            f"`strategy` {strategy} does not divide quantised weights (`quantize`="
            f"{request.quantize!r}). Use ddp, or leave `quantize` out."
        )


for _strategy in (ddp, fsdp, tp, zero3):
    STRATEGIES.register(_strategy.__name__, _strategy)
