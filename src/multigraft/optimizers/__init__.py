"""Optimisers for adapters, one file each. They make ordinary `torch.optim` optimisers."""

from multigraft.optimizers.lorafa import LoraFAOptimizer, create_lorafa_optimizer
from multigraft.optimizers.loraplus import create_loraplus_optimizer
from multigraft.optimizers.riemannian import create_riemannian_optimizer

__all__ = [
    "LoraFAOptimizer",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "create_riemannian_optimizer",
]
