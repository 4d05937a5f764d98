"""Low-rank Hadamard product (LoHa).

    ΔW = scaling * (A1 B1) ∘ (A2 B2)          A: (out, rank)   B: (rank, in)
    kernels with `use_effective_conv2d`:  each factor is T ×1 A ×2 B, T: (rank, rank, k...)

Papers: Hyeon-Woo et al. 2021, arXiv:2108.06098, propositions 1 and 3; LyCORIS, arXiv:2309.14859.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from multigraft.config import PeftType, RankedConfig, require_probability
from multigraft.methods.contract import Method, Params, TensorSpec, method
from multigraft.site import Site


@dataclass
class LoHaConfig(RankedConfig):
    """LoHa's options, under PEFT's names.

    Args:
        rank_dropout: probability that an output feature of the update is dropped in training.
        module_dropout: probability that the whole update is dropped in training.
        use_effective_conv2d: factor kernels larger than 1 along their axes.
        init_weights: start at no change; False starts at random.
    """

    peft_type: str | PeftType | None = PeftType.LOHA
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_probability("LoHaConfig", "rank_dropout", self.rank_dropout)
        require_probability("LoHaConfig", "module_dropout", self.module_dropout)


@method("LOHA", config=LoHaConfig, paper="arXiv:2108.06098")
class LoHa(Method):
    """The Hadamard product of two low-rank matrices."""

    prefix = "hada_"
    geometries = frozenset({"linear", "conv1d_transposed", "conv"})

    def __init__(self, site: Site, config: LoHaConfig) -> None:
        super().__init__(site, config)
        self.rank, self.alpha = config.rank_at(site.target), config.alpha_at(site.target)
        self.scaling = self.alpha / self.rank
        self.rank_dropout, self.module_dropout = config.rank_dropout, config.module_dropout
        self.kernel = tuple(getattr(site.layer, "kernel_size", ()))
        self.is_factored = config.use_effective_conv2d and math.prod(self.kernel) > 1

    def tensors(self) -> dict[str, TensorSpec]:
        in_, out = self.geometry.sizes(self.site.layer)
        in_ //= getattr(self.site.layer, "groups", 1)
        if self.is_factored:
            shapes = {"w1_a": (self.rank, out), "w1_b": (self.rank, in_)}
            shapes |= {"w2_a": (self.rank, out), "w2_b": (self.rank, in_)}
            # A one-dimensional kernel is stored as a flat image of width 1.
            core = (self.rank, self.rank, *self.kernel, *(1,) * (2 - len(self.kernel)))
            shapes |= {"t1": core, "t2": core}
        else:
            wide = in_ * math.prod(self.kernel)
            shapes = {"w1_a": (out, self.rank), "w1_b": (self.rank, wide)}
            shapes |= {"w2_a": (out, self.rank), "w2_b": (self.rank, wide)}
        return {f"hada_{name}": TensorSpec(shape) for name, shape in shapes.items()}

    def reset(self, params: Params) -> None:
        for name, tensor in params.items():
            if name == "hada_w2_b" and self.config.init_weights:
                nn.init.zeros_(tensor)
            else:
                nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))

    def delta(self, params: Params, W: Tensor | None = None) -> Tensor:
        first, second = self._factor(params, 1), self._factor(params, 2)
        product = first * second * self.scaling
        if self.is_factored:
            return product.reshape(self.site.layer.weight.shape)  # type: ignore[arg-type]
        return self.geometry.from_matrix(self.site.layer, product)

    def _factor(self, params: Params, index: int) -> Tensor:
        a, b = params[f"hada_w{index}_a"], params[f"hada_w{index}_b"]
        if self.is_factored:
            return torch.einsum("ij...,jb,ia->ab...", params[f"hada_t{index}"], b, a)
        return a @ b
