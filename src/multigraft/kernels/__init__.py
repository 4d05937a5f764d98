"""Low-rank operators on plain tensors. This package imports nothing else of ours."""

from multigraft.kernels.low_rank import low_rank_add

__all__ = ["low_rank_add"]
