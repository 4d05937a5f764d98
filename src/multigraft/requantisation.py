"""What merging into a quantised base loses, measured and said once per merge."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from multigraft.errors import MultigraftWarning

NAMED = 3
"""Tensors that a warning names."""


@dataclass(frozen=True)
class Loss:
    """How far one stored tensor is from what was to be stored.

    Args:
        where: the tensor's path in the base model.
        storage: the format's name.
        error: ``‖stored - wanted‖ / ‖wanted‖``, Frobenius norms.
        share: ``‖stored - wanted‖ / ‖wanted - base's own‖``: above 1, rounding moved the weight
            further than the adapters did.
    """

    where: str
    storage: str
    error: float
    share: float

    @staticmethod
    def of(where: str, storage: str, own: Tensor, wanted: Tensor, stored: Tensor) -> Loss:
        """Measure; all three tensors have the weight's own dense shape."""
        distance = float((stored.to(wanted.dtype) - wanted).norm())
        size, change = float(wanted.norm()), float((wanted - own.to(wanted.dtype)).norm())
        return Loss(where, storage, _ratio(distance, size), _ratio(distance, change))

    @property
    def is_finite(self) -> bool:
        """Whether the format could hold the values at all."""
        return math.isfinite(self.error)

    def __str__(self) -> str:
        return f"{self.where} {self.error:.1%}"


def report(losses: Sequence[Loss]) -> None:
    """One warning for a merge: where the errors are, the largest first, and what they mean."""
    if not losses:
        return
    worst = sorted(losses, key=lambda loss: loss.error, reverse=True)
    more = f" and {len(worst) - NAMED} more tensors" if len(worst) > NAMED else ""
    formats = ", ".join(sorted({loss.storage for loss in losses}))
    share = max(loss.share for loss in losses)
    warnings.warn(
        f"merged into quantised weights ({formats}), which is lossy. Rounding leaves these errors, "
        f"relative to the merged weight: {', '.join(map(str, worst[:NAMED]))}{more}; they are up "
        f"to {share:.2g} times what the adapters add, so outputs differ from those of the unmerged "
        "adapters. `merge_report` lists all of them; unmerging restores the base exactly.",
        MultigraftWarning,
        stacklevel=4,
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0 if part == 0 else float("inf")
