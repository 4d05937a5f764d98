"""How many ranks are enough, and how a config says it site by site.

A rank is an integer, or a share of the energy: the least rank whose singular values hold so much of
the sum of all squares.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from multigraft.errors import ConfigError

Rank = int | float
"""An integer of at least 1, or a share of the energy above 0 and at most 1."""


@dataclass(frozen=True)
class Residual:
    """What a site's update lost when it was cut to a rank.

    Args:
        path: the site, in the base model.
        rank: of the new pair.
        error: ‖ΔW - B A‖ / ‖ΔW‖ (Frobenius); 0 where there was nothing to lose.
    """

    path: str
    rank: int
    error: float


def check_rank(where: str, name: str, rank: object) -> None:
    """Refuse what is neither a rank nor a share.

    Raises:
        ConfigError: says what it is.
    """
    is_rank = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    is_share = isinstance(rank, float) and 0 < rank <= 1
    if not (is_rank or is_share):
        raise ConfigError(
            f"{where}: `{name}` (={rank!r}) must be an integer of at least 1, or a share of the "
            "energy: a float above 0 and at most 1."
        )


def enough(values: Tensor, rank: Rank) -> int:
    """How many singular values to keep, at least one.

    Args:
        values: in descending order, ``(n, k)``; one number serves all ``n``.
    """
    if not isinstance(rank, float):
        return min(rank, values.shape[-1])
    held = values.double().square().sum(0).cumsum(0)
    return int(torch.searchsorted(held, rank * held[-1])) + 1


def left_out(values: Tensor, kept: int) -> float:
    """The norm of the values that are not kept, relative to that of all."""
    total = values.double().square().sum()
    if total == 0:
        return 0.0
    return math.sqrt(float(values[..., kept:].double().square().sum() / total))


def patterns(ranks: Mapping[str, int], paths: Iterable[str]) -> tuple[int, dict[str, int]]:
    """The commonest rank, and exceptions from it as `rank_pattern` and `alpha_pattern` hold them.

    Args:
        ranks: by what configs' patterns are matched with.
        paths: all that they are matched with; none of the others may match an exception.
    """
    counts = Counter(ranks.values())
    usual = max(counts, key=lambda rank: (counts[rank], rank))
    unusual = {path: rank for path, rank in ranks.items() if rank != usual}
    known = set(paths)
    return usual, {_key(path, known): rank for path, rank in unusual.items()}


def _key(path: str, known: set[str]) -> str:
    """The path where it means only itself; else an expression that does."""
    as_pattern = re.compile(rf"(.*\.)?({path})$")
    if any(as_pattern.match(other) for other in known if other != path):
        return f"^{re.escape(path)}"
    return path
