"""How alike two adapters are at the sites that both have.

    overlap = ‖Uᵀ U'‖² / min(r, r')        1: the smaller one's directions lie within the larger's
    cosine  = ⟨ΔW, ΔW'⟩ / (‖ΔW‖ ‖ΔW'‖)     1: the same change, up to its size; 0: nothing in common

Two random subspaces of d dimensions overlap by max(r, r') / d: that is what chance gives.

The overlap is Hu et al. 2021, arXiv:2106.09685, section 7.2, on the directions of ΔW itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from multigraft.report.figures import SiteFigures


@dataclass(frozen=True)
class Similarity:
    """Two adapters, averaged over the sites that both have.

    Args:
        sites: how many; the figures are None where there are none.
        output, input: overlap of the directions that they write to, and that they read.
        chance: what the output's overlap would be for random directions.
        cosine: of all their changes, taken together.
    """

    first: str
    second: str
    sites: int
    output: float | None
    input: float | None
    chance: float | None
    cosine: float | None


def similarity(
    first: str, a: Mapping[str, SiteFigures], second: str, b: Mapping[str, SiteFigures]
) -> Similarity:
    """Compare two adapters by the figures of their sites, by path."""
    pairs = [(a[path], b[path]) for path in a if path in b and _comparable(a[path], b[path])]
    if not pairs:
        return Similarity(first, second, 0, None, None, None, None)
    output = [_overlap(x.left, y.left) for x, y in pairs]
    read = [_overlap(x.right, y.right) for x, y in pairs]
    chance = [_chance(x, y) for x, y in pairs]
    product = sum(_inner(x, y) for x, y in pairs)
    sizes = [sum(each.norm**2 for each in side) ** 0.5 for side in zip(*pairs, strict=True)]
    count = len(pairs)
    return Similarity(
        first,
        second,
        count,
        sum(output) / count,
        sum(read) / count,
        sum(chance) / count,
        product / (sizes[0] * sizes[1]),
    )


def _comparable(x: SiteFigures, y: SiteFigures) -> bool:
    """Whether both have directions there, in spaces of the same size."""
    if x.left is None or y.left is None or x.right is None or y.right is None:
        return False
    if not x.left.shape[1] or not y.left.shape[1]:
        return False
    return x.left.shape[0] == y.left.shape[0] and x.right.shape[0] == y.right.shape[0]


def _overlap(U: Tensor | None, V: Tensor | None) -> float:
    assert U is not None and V is not None
    return float((U.mT @ V).square().sum()) / min(U.shape[1], V.shape[1])


def _chance(x: SiteFigures, y: SiteFigures) -> float:
    assert x.left is not None and y.left is not None
    return max(x.left.shape[1], y.left.shape[1]) / x.left.shape[0]


def _inner(x: SiteFigures, y: SiteFigures) -> float:
    """``⟨ΔW, ΔW'⟩ = Σ σ_i σ'_j (u_i · u'_j) (v_i · v'_j)``."""
    assert x.left is not None and y.left is not None
    assert x.right is not None and y.right is not None
    s, t = (
        each.left.new_tensor(each.values[: each.left.shape[1]])  # type: ignore[union-attr]
        for each in (x, y)
    )
    both = (x.left.mT @ y.left) * (x.right.mT @ y.right)
    return float(s @ both @ t)
