"""What a model offers of adapter arithmetic, under PEFT's names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from multigraft.combine.contract import Options
from multigraft.combine.ranks import Rank, Residual, check_rank
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
        svd_rank: Rank | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Graft a new adapter, the weighted combination of others; it starts inactive and frozen.

        They are LoRAs, or IA3s, whose vectors add up whatever the rest says.

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
                default. A float is a share of the energy: each layer gets the least rank that holds
                it.
            svd_clamp: the quantile at which the decomposition's elements are cut off.
            svd_full_matrices: kept for PEFT's signature; what it adds is never used.
            svd_driver: cuSOLVER's method, on a GPU.
            density: share of the elements that stay, above 0 and at most 1.
            majority_sign_method: ``"total"`` or ``"frequency"``: how TIES elects a sign.

        Raises:
            AdapterNameError: ``adapter_name`` is taken, or a source is unknown.
            ConfigError, UnsupportedError, TargetError: what is asked for cannot be had, and why.
        """
        from multigraft.combine import ia3  # these know the tuner
        from multigraft.combine.weighted import add_weighted

        tuner = cast("Tuner", self)
        if ia3.are_all(tuner, adapters):
            ia3.add_weighted(tuner, adapters, weights, adapter_name, combination_type)
            return
        options = Options(density, majority_sign_method, svd_clamp, svd_driver)
        request = Request.of(adapters, weights, combination_type, svd_rank, options)
        add_weighted(tuner, request, adapter_name)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `convert_to_lora` can make a LoRA of this adapter.

        Raises:
            AdapterNameError: there is no such adapter.
        """
        from multigraft.combine.convert import is_convertible

        return is_convertible(cast("Tuner", self).roster, adapter_name)

    def compress_adapter(
        self, adapter_name: str, new_name: str, rank: Rank = 0.99
    ) -> list[Residual]:
        """Graft a copy of a LoRA of a lower rank, the nearest to it; inactive and frozen.

        It is decomposed by its factors (QR of both, then a small SVD), so no dense update is made.
        Whatever else the adapter has, it has too.

        Args:
            rank: of each layer, at most; or a float: the share of the energy, the sum of squared
                singular values, that is kept at each layer.

        Returns:
            The rank and the relative error of each layer.

        Raises:
            AdapterNameError: ``new_name`` is taken, or there is no such adapter.
            ConfigError, UnsupportedError: what is asked for cannot be had, and why.
        """
        from multigraft.combine.weighted import add_weighted

        check_rank("compress_adapter", "rank", rank)
        request = Request.of([adapter_name], [1.0], "svd", rank, Options())
        return add_weighted(cast("Tuner", self), request, new_name, is_fitted=True)
