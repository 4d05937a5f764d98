"""Low-rank operators on plain tensors. This package imports nothing else of ours."""

from multigraft.kernels.adapted_linear import (
    Dropped,
    Seeded,
    adapted_linear,
    adapted_linears,
)
from multigraft.kernels.autocast import is_autocasting, without_autocast
from multigraft.kernels.compressed import compressed_linear, group_size, grouped_features
from multigraft.kernels.layout import Part, Stack, constants
from multigraft.kernels.low_rank import low_rank_add
from multigraft.kernels.node import IS_TRACED
from multigraft.kernels.regenerated import can_regenerate, draw_seed, masked_input, scrambled
from multigraft.kernels.reweighted_linear import Reweighted, reweighted_linears
from multigraft.kernels.reweighted_matrices import reweighted_matrices
from multigraft.kernels.routed import grouped, masked

AnyPart = Part | Reweighted
"""A layer of those that run as one node; in one node all are of one kind."""

__all__ = [
    "IS_TRACED",
    "AnyPart",
    "Dropped",
    "Part",
    "Reweighted",
    "Seeded",
    "Stack",
    "adapted_linear",
    "adapted_linears",
    "can_regenerate",
    "compressed_linear",
    "constants",
    "draw_seed",
    "group_size",
    "grouped",
    "grouped_features",
    "is_autocasting",
    "low_rank_add",
    "masked",
    "masked_input",
    "reweighted_linears",
    "reweighted_matrices",
    "scrambled",
    "without_autocast",
]
