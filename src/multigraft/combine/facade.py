"""What a model offers of adapter arithmetic, under PEFT's names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from multigraft.combine.contract import Options
from multigraft.combine.request import Request

if TYPE_CHECKING:
    from multigraft.tuner import Tuner


class Combines:
    """Mixed into the tuner, and so at hand on every handle."""

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Graft a new LoRA, the weighted combination of others; it starts inactive and frozen.

        The new one carries what the sources do whole: their scalings (rsLoRA's, patterns, and what
        `set_scale` made of them), DoRA's magnitudes, biases, and saved modules, each as a change
        of the base.

        Args:
            weights: one for each of ``adapters``, of either sign.
            combination_type: ``"cat"`` is the exact sum, at the sum of the ranks; ``"svd"`` the
                nearest to it of a given rank; ``"linear"`` a rough approximation. ``"ties"``,
                ``"dare_linear"``, ``"dare_ties"`` and ``"magnitude_prune"`` leave out elements of
                the factors; with ``"_svd"`` behind, of the dense update.
            svd_rank: rank of the result of rules that end in ``svd``; the sources' largest by
                default.
            svd_clamp: the quantile at which the decomposition's elements are cut off.
            svd_full_matrices: kept for PEFT's signature; what it adds is never used.
            svd_driver: cuSOLVER's method, on a GPU.
            density: share of the elements that stay, above 0 and at most 1.
            majority_sign_method: ``"total"`` or ``"frequency"``: how TIES elects a sign.

        Raises:
            AdapterNameError: ``adapter_name`` is taken, or a source is unknown.
            ConfigError, UnsupportedError, TargetError: what is asked for cannot be had, and why.
        """
        from multigraft.combine.weighted import add_weighted  # which knows the tuner

        options = Options(density, majority_sign_method, svd_clamp, svd_driver)
        request = Request.of(adapters, weights, combination_type, svd_rank, options)
        add_weighted(cast("Tuner", self), request, adapter_name)
