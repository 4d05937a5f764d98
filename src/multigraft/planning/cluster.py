"""Many GPUs on paper: memory and traffic of each, and what a step would take at stated rates.

Bytes are counted; seconds are estimates, from the rates that are given: a link's bytes and a GPU's
operations in a second. A step takes no less than the longer of computing and sending, and no more
than both one after the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from multigraft.config import PeftConfig
from multigraft.errors import ConfigError
from multigraft.planning.memory import MemoryPlan, allowance, planned
from multigraft.planning.request import Request
from multigraft.planning.sizes import as_text, bytes_of
from multigraft.planning.step import BASE
from multigraft.planning.strategies import GATHERED, STRATEGIES, OfRank

LINK = "50GB"
"""Bytes that a GPU sends in a second where nothing is said: a 400 Gbit network card each."""
SPEED = 400e12
"""Operations of a GPU in a second where nothing is said: an H100's in bfloat16, sustained."""
ESTIMATES = "seconds (estimate)      tokens a second (estimate)"
PREFIXES = {"": 1.0, "G": 1e9, "T": 1e12, "P": 1e15}


@dataclass(frozen=True)
class ClusterPlan:
    """A request on so many GPUs.

    Args:
        of_rank: what each of them holds and sends.
        link: bytes that each sends in a second.
        speed: operations of each in a second.
    """

    request: Request
    strategy: str
    gpus: int
    of_rank: OfRank
    link: float
    speed: float

    @property
    def peak(self) -> int:
        """The most bytes of tensors on a GPU at once."""
        return sum(self.of_rank.parts.values())

    @property
    def total(self) -> int:
        """Peak and allowance."""
        weights = self.of_rank.parts[BASE] + self.of_rank.parts.get(GATHERED, 0)
        return self.peak + allowance(self.request, self.peak, weights)

    @property
    def fits(self) -> bool | None:
        """Whether a GPU has as much memory; None where nobody knows."""
        available = self.request.available
        return None if available is None else self.total <= available

    @property
    def sent(self) -> int:
        """Bytes that each GPU sends in a step."""
        return self.of_rank.traffic.sent(self.gpus)

    @property
    def computing(self) -> float:
        """Seconds of a step's products."""
        return self.of_rank.plan.flops / self.speed

    @property
    def sending(self) -> float:
        """Seconds of a step's traffic."""
        return self.sent / self.link

    @property
    def tokens(self) -> int:
        """Of a step, on all GPUs together."""
        request = self.request
        own = sum(load.rows * load.tokens for load in request.loads())
        return own * request.accumulate * self.of_rank.copies

    @property
    def seconds(self) -> tuple[float, float]:
        """Of a step: with everything sent while something is computed, and with nothing."""
        return max(self.computing, self.sending), self.computing + self.sending

    @property
    def tokens_per_second(self) -> tuple[float, float]:
        """The fewer first."""
        quick, slow = self.seconds
        return self.tokens / slow, self.tokens / quick


def clusters(
    model: Any,
    adapters: PeftConfig | Mapping[str, PeftConfig],
    *,
    gpus: Sequence[int],
    strategy: str = "fsdp",
    link: str | float = LINK,
    speed: str | float = SPEED,
    **options: Any,
) -> Iterator[ClusterPlan]:
    """What a step takes on each of several numbers of GPUs.

    Args:
        model, adapters, options: as for `multigraft.planning.plan`; rows are those of each GPU, but
            for ``"tp"``, whose GPUs see the same ones.
        gpus: how many; one plan for each.
        strategy: ``"ddp"``, ``"fsdp"``, ``"tp"`` or ``"zero3"``.
        link: bytes, or text such as ``"50GB"``, that each GPU sends in a second.
        speed: operations, or text such as ``"400T"``, of each GPU in a second.

    Raises:
        MultigraftError: as for `plan`; or the strategy cannot do this.
    """
    named = adapters if isinstance(adapters, Mapping) else {"default": adapters}
    request = Request(model, dict(named), **options)
    return spread_over(dict.fromkeys(gpus, request), strategy, link=link, speed=speed)


def spread_over(
    requests: Mapping[int, Request],
    strategy: str,
    *,
    link: str | float = LINK,
    speed: str | float = SPEED,
) -> Iterator[ClusterPlan]:
    """The same for what each of so many GPUs is asked to do; see `clusters`.

    Args:
        requests: by how many GPUs there are.
    """
    run = STRATEGIES[strategy]
    rate = bytes_of(link, "link") if isinstance(link, str) else link
    operating = operations(speed)
    for count in requests:
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ConfigError(f"`gpus` (={count!r}) must be an integer of at least 1.")
    known: list[tuple[Request, MemoryPlan]] = []

    def plan_of(asked: Request) -> MemoryPlan:
        found = next((plan for request, plan in known if request == asked), None)
        if found is None:
            known.append((asked, found := planned(asked)))
        return found

    for count, request in requests.items():
        found = run(request, count, plan_of)
        yield ClusterPlan(request, strategy, count, found, rate, operating)


def operations(value: str | float) -> float:
    """The operations in a second that ``400T`` stands for.

    Raises:
        ConfigError: it is no number above zero.
    """
    match = re.fullmatch(
        r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([GTP]?)(?:FLOP/?s?)?\s*", str(value), re.I
    )
    found = float(match[1]) * PREFIXES[match[2].upper()] if match else 0.0
    if found <= 0:
        raise ConfigError(
            f"`speed` (={value!r}) must be a number of operations in a second, such as 400T."
        )
    return found


def cluster_table(plans: Sequence[ClusterPlan]) -> str:
    """The plans, a line each."""
    lines = [f"   {'GPUs':>4}   {'memory of each':<14}   {'sent by each':<12}   {ESTIMATES}"]
    for plan in plans:
        quick, slow = plan.seconds
        few, many = plan.tokens_per_second
        mark = {None: "", True: "✓", False: "✗"}[plan.fits]
        lines.append(
            f"   {plan.gpus:>4}   {as_text(plan.total):>11} {mark:<2}   {as_text(plan.sent):>12}   "
            f"{quick:>9.3g} – {slow:<6.3g}   {few:>12,.0f} – {many:,.0f}"
        )
    return "\n".join(lines)


def notes(plan: ClusterPlan) -> str:
    """What the table's numbers rest on."""
    counted = (
        "bytes are counted"
        if plan.of_rank.measured
        else "bytes follow from DeepSpeed's documentation, and no test compares them"
    )
    rows = "the same rows on all GPUs" if plan.strategy == "tp" else "rows of its own on each GPU"
    rates = f"{plan.link / 1e9:,.3g} GB/s and {plan.speed / 1e12:,.4g} TFLOP/s"
    return (
        f"{plan.strategy}: {rows}; {counted}. Seconds are estimates, at {rates} for each GPU: the "
        "first with all traffic hidden behind computing, the second with none."
    )


def as_rows(plans: Sequence[ClusterPlan]) -> list[dict[str, Any]]:
    """The plans for JSON; sizes in bytes."""
    return [
        {
            "gpus": plan.gpus,
            "strategy": plan.strategy,
            "parts": dict(plan.of_rank.parts),
            "total": plan.total,
            "fits": plan.fits,
            "all_gather": plan.of_rank.traffic.all_gather,
            "reduce_scatter": plan.of_rank.traffic.reduce_scatter,
            "all_reduce": plan.of_rank.traffic.all_reduce,
            "sent": plan.sent,
            "flops": plan.of_rank.plan.flops,
            "tokens": plan.tokens,
            "estimated_seconds": list(plan.seconds),
            "estimated_tokens_per_second": list(plan.tokens_per_second),
            "is_measured": plan.of_rank.measured,
        }
        for plan in plans
    ]
