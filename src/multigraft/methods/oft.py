"""Orthogonal fine-tuning (OFT).

    y = W (R x) + b        R = diag(R_1, ..., R_r),  R_i = (I + Q_i)(I - Q_i)^-1,  Q_i skew

Q_i is stored as its upper triangle: (blocks, block_size (block_size - 1) / 2). The Cayley map is
taken exactly, or as a Neumann series of a few terms. Linear layers rotate their input, embeddings
what they give; a convolution rotates its kernels, each read as a vector over (in, k...).

Papers: Qiu et al. 2023, arXiv:2306.07280; Neumann series: Qiu et al. 2025, arXiv:2506.19847.
Departs: PEFT rotates a convolution's unfolded input and folds it back, so that its forward is not
its merged weight; here both are the paper's W' = W R. PEFT's `module_dropout` has no effect.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from multigraft.config import PeftType, TargetedConfig, require, require_probability
from multigraft.errors import ConfigError, MultigraftWarning
from multigraft.methods.contract import Method, Params, TensorSpec, method
from multigraft.site import Site


@dataclass
class OFTConfig(TargetedConfig):
    """OFT's options, under PEFT's names.

    Args:
        r: number of blocks; exactly one of `r` and `oft_block_size` is set, the other is 0.
        oft_block_size: size of a block; the nearest divisor of the layer's input size is taken.
        module_dropout: probability that a block is the identity in training.
        coft: keep each Q within `eps` of zero.
        eps: radius for `coft`.
        block_share: one block for all.
        use_cayley_neumann: approximate the inverse by a series.
        num_cayley_neumann_terms: number of its terms.
        init_weights: start at the identity; False starts at random.
        bias: only ``"none"`` is built.
        fan_in_fan_out: kept for the file format; the layer's own type says how it is stored.
    """

    peft_type: str | PeftType | None = PeftType.OFT
    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    _unbuilt: ClassVar[Mapping[str, Any]] = {"bias": "none"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.r == 0) == (self.oft_block_size == 0):
            raise ConfigError(
                f"OFTConfig: exactly one of `r` (={self.r}) and `oft_block_size` "
                f"(={self.oft_block_size}) must be set. Set the other one to 0."
            )
        require(self.r >= 0, "OFTConfig", "r", self.r, "at least 0")
        require(
            self.oft_block_size >= 0,
            "OFTConfig",
            "oft_block_size",
            self.oft_block_size,
            "at least 0",
        )
        require_probability("OFTConfig", "module_dropout", self.module_dropout)

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """A file's values, unless its writer's OFT was another one.

        Raises:
            ConfigError: PEFT below 0.15 wrote it, whose tensors mean something else.
        """
        if "oft_block_size" not in kwargs:
            raise ConfigError(
                "the file has no `oft_block_size`: PEFT below 0.15 wrote it, and its OFT was "
                "another one. Train it anew, or use it with PEFT 0.13."
            )
        if kwargs.get("use_cayley_neumann") and not _is_since(kwargs.get("peft_version"), (0, 18)):
            warnings.warn(
                "the adapter was trained with PEFT below 0.18, whose `use_cayley_neumann` was "
                "another series: outputs differ. Train it anew, or use it with PEFT 0.17.",
                MultigraftWarning,
                stacklevel=2,
            )
        return super().check_kwargs(**kwargs)


@method("OFT", config=OFTConfig, paper="arXiv:2306.07280")
class OFT(Method):
    """A block-diagonal rotation of what the layer sees."""

    prefix = "oft_"
    kind: Literal["additive", "map", "replace"] = "map"
    geometries = frozenset({"linear", "conv1d_transposed", "conv", "embedding"})

    def __init__(self, site: Site, config: OFTConfig) -> None:
        super().__init__(site, config)
        self.is_lookup = self.geometry.name == "embedding"
        self.q = f"oft_{'embedding_' if self.is_lookup else ''}R.weight"
        size = self.geometry.sizes(site.layer)[1 if self.is_lookup else 0]
        if self.geometry.name == "conv":
            self.kind, self.needs_weight = "additive", True
            size = size // getattr(site.layer, "groups", 1) * math.prod(site.layer.kernel_size)  # type: ignore[arg-type]
        wanted = config.oft_block_size or config.r
        found = _nearest_divisor(size, wanted)
        if found != wanted:
            name = "oft_block_size" if config.oft_block_size else "r"
            warnings.warn(
                f"{site.path}: `{name}` (={wanted}) does not divide the input size (={size}); "
                f"{found} is used.",
                MultigraftWarning,
                stacklevel=2,
            )
        self.block = found if config.oft_block_size else size // found
        self.rank = size // self.block

    def tensors(self) -> dict[str, TensorSpec]:
        blocks = 1 if self.config.block_share else self.rank
        return {self.q: TensorSpec((blocks, self.block * (self.block - 1) // 2))}

    def reset(self, params: Params) -> None:
        if self.config.init_weights:
            nn.init.zeros_(params[self.q])
        else:
            nn.init.normal_(params[self.q], std=0.1)

    def input(self, params: Params, x: Tensor) -> Tensor:
        return x if self.is_lookup else self._turned(params, x)

    def output(self, params: Params, y: Tensor) -> Tensor:
        return self._turned(params, y) if self.is_lookup else y

    def _turned(self, params: Params, x: Tensor) -> Tensor:
        """Each block of the last axis times its rotation."""
        R = self._rotation(params)
        blocks = x.to(R.dtype).unflatten(-1, (self.rank, self.block))
        return torch.einsum("...rk,rkc->...rc", blocks, R).flatten(-2).to(x.dtype)

    def delta(self, params: Params, W: Tensor | None = None) -> Tensor:
        assert W is not None
        R = self._rotation(params)
        M = self.geometry.as_matrix(self.site.layer, W).unflatten(-1, (self.rank, self.block))
        turned = torch.einsum("ork,rck->orc", M, R).flatten(-2)
        return self.geometry.from_matrix(self.site.layer, turned) - W

    def _rotation(self, params: Params) -> Tensor:
        """All blocks, ``(rank, block, block)``."""
        q = params[self.q]
        if self.config.coft:
            q = self._near_zero(q)
        row, column = torch.triu_indices(self.block, self.block, 1, device=q.device)
        upper = q.new_zeros((len(q), self.block, self.block))
        upper = upper.index_put((torch.arange(len(q), device=q.device)[:, None], row, column), q)
        Q = upper - upper.mT
        R = self._cayley(Q)
        # Merging, whose tensors have no gradients, takes all blocks even in training.
        is_training = self.site.layer.training and q.requires_grad
        if self.config.module_dropout and is_training and len(q) > 1:
            R = self._some_identity(R)
        return R.expand(self.rank, -1, -1)

    def _cayley(self, Q: Tensor) -> Tensor:
        eye = torch.eye(self.block, device=Q.device, dtype=Q.dtype)
        terms = self.config.num_cayley_neumann_terms
        terms = 4 if terms == 3 else terms  # as in PEFT, whose 3 terms are its 4
        if not self.config.use_cayley_neumann:
            return torch.linalg.solve(eye + Q, eye - Q, left=False)
        # (I + Q)(I + Q + Q² + ...): twice every power but the first and the last one kept.
        R = eye.expand_as(Q)
        power = eye.expand_as(Q)
        for term in range(1, terms):
            power = power @ Q
            R = R + power * (1.0 if 2 < term == terms - 1 else 2.0)
        return R

    def _near_zero(self, q: Tensor) -> Tensor:
        """Each block within its share of `eps` of the zero matrix, in the Frobenius norm.

        In training the parameter itself is moved there, so that optimisers descend by projected
        gradients, as the paper's constrained form does.
        """
        with torch.no_grad():
            radius = self.config.eps / math.sqrt(len(q))
            norm = q.norm(dim=1, keepdim=True) * math.sqrt(2)
            near = torch.where(norm <= radius, q, q * (radius / norm.clamp_min(1e-30)))
        if not (q.requires_grad and torch.is_grad_enabled()):
            return near
        # Past the version counter: moving it twice in one forward changes nothing.
        q.data.copy_(near)
        return q

    def _some_identity(self, R: Tensor) -> Tensor:
        dropped = torch.randperm(len(R), device=R.device) < int(self.config.module_dropout * len(R))
        eye = torch.eye(self.block, device=R.device, dtype=R.dtype)
        return torch.where(dropped[:, None, None], eye, R)


def _nearest_divisor(size: int, wanted: int) -> int:
    """The divisor of ``size`` nearest to ``wanted``; the smaller one of two."""
    if wanted >= size:
        return size
    lower = next(d for d in range(wanted, 0, -1) if size % d == 0)
    higher = next(d for d in range(wanted, size + 1) if size % d == 0)
    return lower if wanted - lower <= higher - wanted else higher


def _is_since(version: Any, least: tuple[int, int]) -> bool:
    """Whether a file's version is at least this one; files of before 0.18 have none."""
    numbers = re.findall(r"\d{1,9}", str(version or "0.0"))[:2]
    return tuple(map(int, numbers)) >= least
