"""What merging into a quantised base loses, measured and said once per merge."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from multigraft.errors import MultigraftWarning


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
        """Measure; all three tensors have the weight's own dense shape.

        Raises:
            ValueError: the format could not hold the values.
        """
        distance = float((stored.to(wanted.dtype) - wanted).norm())
        size, change = float(wanted.norm()), float((wanted - own.to(wanted.dtype)).norm())
        loss = Loss(where, storage, _ratio(distance, size), _ratio(distance, change))
        if not distance < float("inf"):
            raise ValueError(
                f"{where}: the merged values do not fit into the {storage} format; nothing was "
                "merged. Check the adapter's tensors, or keep the adapter."
            )
        return loss


def report(losses: Sequence[Loss]) -> None:
    """One warning for a merge: the largest error, where, and what it means."""
    if not losses:
        return
    worst = max(losses, key=lambda loss: loss.error)
    formats = ", ".join(sorted({loss.storage for loss in losses}))
    share = max(loss.share for loss in losses)
    warnings.warn(
        f"merged into quantised weights ({formats}), which is lossy: rounding leaves an error of "
        f"up to {worst.error:.1%} of the merged weight ({worst.where}), up to {share:.2g} times "
        "what the adapters add. Outputs differ from those of the unmerged adapters; unmerging "
        "restores the base exactly.",
        MultigraftWarning,
        stacklevel=4,
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0 if part == 0 else float("inf")
