"""One scale and one rank for all layers, without changing what any of them adds.

    s B A = s₀ (s/s₀ B) A = s₀ [s/s₀ B, 0] [A; 0]

Padding with zeros is exact. Multiplying is exact where the ratio is a power of two and
nothing leaves the dtype's range; else the pair goes into float32, where it is rounded once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from multigraft.errors import CheckpointError
from multigraft.exchange.contract import Pair
from multigraft.reading import shown

CLOSE = 1e-12
"""Ratios that differ from 1 by less are 1: alpha / rank · rank is not always alpha."""


def usual_scale(pairs: Mapping[str, Pair]) -> float:
    """The scale that most layers have; never 0, which some programs read as 1."""
    counts = Counter(pair.scale for pair in pairs.values() if pair.scale)
    return counts.most_common(1)[0][0] if counts else 1.0


def folded(
    pairs: Mapping[str, Pair], done: list[str], *, rank: int | None, scale: float
) -> dict[str, Pair]:
    """The same pairs with this scale everywhere, and of this rank; what was done is appended.

    Args:
        rank: of every layer, at least the largest; None leaves ranks as they are.

    Raises:
        CheckpointError: a product is too large for float32.
    """
    result, scaled, rounded, padded = {}, 0, 0, 0
    for site, pair in pairs.items():
        A, B, ratio = pair.A, pair.B, pair.scale / scale
        if not math.isclose(ratio, 1.0, rel_tol=CLOSE):
            A, B, is_exact = _scaled(A, B, ratio, site)
            scaled, rounded = scaled + 1, rounded + (not is_exact)
        wanted = pair.rank if rank is None else rank
        if wanted > pair.rank:
            A, B = _padded(A, B, wanted - pair.rank)
            padded += 1
        result[site] = Pair(A, B, scale * wanted, pair.magnitude, pair.is_lookup)
    if scaled:
        how = f"{rounded} of them in float32, rounded once" if rounded else "exactly"
        done.append(f"folded the scales of {scaled} of {len(pairs)} layers into B, {how}")
    if padded:
        done.append(f"padded {padded} of {len(pairs)} layers with zeros to rank {rank}")
    return result


def as_number(value: float) -> float:
    """An integer where it is one: some programs declare alpha as such."""
    near = round(value)
    return near if math.isclose(value, near, rel_tol=CLOSE) else value


def _scaled(A: Tensor, B: Tensor, ratio: float, site: str) -> tuple[Tensor, Tensor, bool]:
    """A and ``ratio * B``, and whether that is exact; in float32 where it is not."""
    product = B.double() * ratio
    own = product.to(B.dtype)
    if _is_power_of_two(ratio) and torch.equal(own.double(), product):
        return A, own, True
    wide = torch.promote_types(B.dtype, torch.float32)
    B = product.to(wide)
    if not bool(torch.isfinite(B).all()):
        raise CheckpointError(
            f"the scale of {shown(site)}, folded into B, makes values that float32 cannot hold. "
            "Compare its alpha with those of the other layers."
        )
    return A.to(wide), B, False


def _is_power_of_two(value: float) -> bool:
    return abs(math.frexp(value)[0]) in (0.5, 0.0)


def _padded(A: Tensor, B: Tensor, more: int) -> tuple[Tensor, Tensor]:
    A = torch.cat([A, A.new_zeros((more, *A.shape[1:]))], 0)
    B = torch.cat([B, B.new_zeros((B.shape[0], more, *B.shape[2:]))], 1)
    return A, B
