"""Low-rank Kronecker product (LoKr).

    ΔW = scaling * W1 ⊗ W2        W1: (out1, in1)   W2: (out2, in2, k...)
    out = out1 out2, in = in1 in2; either factor may itself be a product of rank r

Papers: Edalati et al. 2022, arXiv:2212.10650; LyCORIS, arXiv:2309.14859, section 3.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from multigraft.config import PeftType, RankedConfig, require, require_probability
from multigraft.methods.contract import Method, Params, TensorSpec, method
from multigraft.site import Site


@dataclass
class LoKrConfig(RankedConfig):
    """LoKr's options, under PEFT's names.

    Args:
        rank_dropout: probability that an output feature of the update is dropped in training.
        module_dropout: probability that the whole update is dropped in training.
        use_effective_conv2d: factor kernels larger than 1 along their axes.
        decompose_both: factor W1 as well where the rank is small enough.
        decompose_factor: size of W1's sides where it divides the layer's; -1 for nearly square.
        rank_dropout_scale: scale up the features that stay for those that go.
        init_weights: True (W1 = 0), ``"lycoris"`` (W2 = 0), or False (both random).
    """

    peft_type: str | PeftType | None = PeftType.LOKR
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    init_weights: bool | str = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_probability("LoKrConfig", "rank_dropout", self.rank_dropout)
        require_probability("LoKrConfig", "module_dropout", self.module_dropout)
        factor = self.decompose_factor
        is_factor = factor == -1 or factor > 0
        require(is_factor, "LoKrConfig", "decompose_factor", factor, "-1 or at least 1")
        known = self.init_weights in (True, False, "lycoris")
        choices = 'True, False or "lycoris"'
        require(known, "LoKrConfig", "init_weights", self.init_weights, choices)


def split(size: int, limit: int = -1) -> tuple[int, int]:
    """Two factors of ``size``: ``limit`` and the rest where it divides.

    Otherwise the smaller one first, as near to square as possible with the smaller one at most
    ``limit`` (-1: no limit).
    """
    if limit > 0 and size % limit == 0:
        return limit, size // limit
    bound = size if limit == -1 else limit
    divisors = (d for d in range(math.isqrt(size), 0, -1) if size % d == 0 and d <= bound)
    smaller = next(divisors, 1)
    return smaller, size // smaller


@method("LOKR", config=LoKrConfig, paper="arXiv:2309.14859")
class LoKr(Method):
    """A Kronecker product of two small matrices."""

    prefix = "lokr_"
    geometries = frozenset({"linear", "conv1d_transposed", "conv"})

    def __init__(self, site: Site, config: LoKrConfig) -> None:
        super().__init__(site, config)
        self.rank, self.alpha = config.rank_at(site.target), config.alpha_at(site.target)
        self.scaling = self.alpha / self.rank
        self.rank_dropout, self.module_dropout = config.rank_dropout, config.module_dropout
        self.rank_dropout_scale = config.rank_dropout_scale
        in_, out = self.geometry.sizes(site.layer)
        in_ //= getattr(site.layer, "groups", 1)
        self.ins = split(in_, config.decompose_factor)
        self.outs = split(out, config.decompose_factor)
        self.kernel = tuple(getattr(site.layer, "kernel_size", ()))
        small = config.decompose_both and self.rank < max(self.outs[0], self.ins[0]) / 2
        self.has_whole_w1 = not small
        self.has_whole_w2 = self.rank >= max(self.outs[1], self.ins[1]) / 2
        self.is_factored = config.use_effective_conv2d and math.prod(self.kernel) > 1

    def tensors(self) -> dict[str, TensorSpec]:
        (out1, out2), (in1, in2), r = self.outs, self.ins, self.rank
        shapes: dict[str, tuple[int, ...]] = {}
        if self.has_whole_w1:
            shapes["w1"] = (out1, in1)
        else:
            shapes |= {"w1_a": (out1, r), "w1_b": (r, in1)}
        if self.has_whole_w2:
            shapes["w2"] = (out2, in2, *self.kernel)
        elif self.is_factored:
            shapes |= {"w2_a": (r, out2), "w2_b": (r, in2)}
            # A one-dimensional kernel is stored as a flat image of width 1.
            shapes["t2"] = (r, r, *self.kernel, *(1,) * (2 - len(self.kernel)))
        else:
            shapes |= {"w2_a": (out2, r), "w2_b": (r, in2 * math.prod(self.kernel))}
        return {f"lokr_{name}": TensorSpec(shape) for name, shape in shapes.items()}

    def reset(self, params: Params) -> None:
        init = self.config.init_weights
        if not init:
            zeros: tuple[str, ...] = ()
        elif init == "lycoris":
            zeros = ("lokr_w2", "lokr_w2_b")
        else:
            zeros = ("lokr_w1", "lokr_w1_a")
        for name, tensor in params.items():
            if name in zeros:
                nn.init.zeros_(tensor)
            else:
                nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))

    def delta(self, params: Params, W: Tensor | None = None) -> Tensor:
        w1, w2 = self._w1(params), self._w2(params)
        if w2.dim() == 4:
            w1 = w1[:, :, None, None]
        product = torch.kron(w1, w2.contiguous()) * self.scaling
        if self.kernel:
            # PEFT's layout: a whole three-dimensional W2 meets W1 in its last two axes.
            return product.reshape(self.site.layer.weight.shape)  # type: ignore[arg-type]
        return self.geometry.from_matrix(self.site.layer, product)

    def _w1(self, params: Params) -> Tensor:
        if self.has_whole_w1:
            return params["lokr_w1"]
        return params["lokr_w1_a"] @ params["lokr_w1_b"]

    def _w2(self, params: Params) -> Tensor:
        if self.has_whole_w2:
            return params["lokr_w2"]
        a, b = params["lokr_w2_a"], params["lokr_w2_b"]
        if self.is_factored:
            return torch.einsum("ij...,jb,ia->ab...", params["lokr_t2"], b, a)
        return a @ b
