"""Low-rank operators on plain tensors. This package imports nothing else of ours."""

from multigraft.kernels.adapted_linear import adapted_linear
from multigraft.kernels.compressed import compressed_linear, group_size, grouped_features
from multigraft.kernels.low_rank import low_rank_add
from multigraft.kernels.reweighted_linear import reweighted_linear
from multigraft.kernels.routed import grouped, grouped_linear, masked

__all__ = [
    "adapted_linear",
    "compressed_linear",
    "group_size",
    "grouped",
    "grouped_features",
    "grouped_linear",
    "low_rank_add",
    "masked",
    "reweighted_linear",
]
