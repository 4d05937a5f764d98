"""Methods: one file each. The import list is explicit and sorted."""

from multigraft.methods import (
    adalora,
    bias,
    hira,
    ia3,
    ln_tuning,
    loha,
    lokr,
    lora,
    oft,
    saved_module,
    trainable_tokens,
    vera,
)
from multigraft.methods.contract import METHODS, Method, Schedule, TensorSpec, method

__all__ = [
    "METHODS",
    "Method",
    "Schedule",
    "TensorSpec",
    "adalora",
    "bias",
    "hira",
    "ia3",
    "ln_tuning",
    "loha",
    "lokr",
    "lora",
    "method",
    "oft",
    "saved_module",
    "trainable_tokens",
    "vera",
]
