"""Low-rank operators on plain tensors. This package imports nothing else of ours."""

from multigraft.kernels.adapted_linear import adapted_linear
from multigraft.kernels.low_rank import low_rank_add
from multigraft.kernels.routed import grouped, grouped_linear, masked

__all__ = ["adapted_linear", "grouped", "grouped_linear", "low_rank_add", "masked"]
