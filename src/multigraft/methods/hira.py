"""Hadamard high-rank adaptation (HiRA).

    W' = W + W ∘ (B A)        A: (rank, in)   B: (out, rank)

Paper: Huang et al. 2025, "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large
Language Models", ICLR 2025, eq. 3.
Departs: no scaling, as in PEFT, whose files these are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor, nn

from multigraft.config import (
    PeftType,
    TargetedConfig,
    check_patterns,
    pattern_value,
    require,
    require_probability,
)
from multigraft.errors import TargetError
from multigraft.methods.contract import Method, Params, TensorSpec, method
from multigraft.site import Site


@dataclass
class HiraConfig(TargetedConfig):
    """HiRA's options, under PEFT's names.

    Args:
        r: rank of the modulation.
        hira_dropout: probability that an element of the adapter's input is dropped in training.
        fan_in_fan_out: kept for the file format; the layer's own type says how it is stored.
        init_weights: True (B = 0), ``"gaussian"`` (A normal, B = 0), or False (both random).
        rank_pattern: exceptions per site, regular expressions to ranks.
    """

    peft_type: str | PeftType | None = PeftType.HIRA
    r: int = 32
    hira_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool | str | None = True
    rank_pattern: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rank_pattern = check_patterns("HiraConfig", "rank_pattern", self.rank_pattern)
        for name, rank in [("r", self.r), *self.rank_pattern.items()]:
            require(isinstance(rank, int) and rank > 0, "HiraConfig", name, rank, "at least 1")
        require_probability("HiraConfig", "hira_dropout", self.hira_dropout)
        known = self.init_weights in (True, False, None, "gaussian")
        choices = 'True, False or "gaussian"'
        require(known, "HiraConfig", "init_weights", self.init_weights, choices)


@method("HIRA", config=HiraConfig, paper="ICLR 2025, openreview.net/forum?id=TwJrTz9cRS")
class HiRA(Method):
    """The weight itself, modulated by a low-rank matrix."""

    prefix = "hira_"
    needs_weight = True
    geometries = frozenset({"linear", "conv1d_transposed", "conv", "embedding"})

    def __init__(self, site: Site, config: HiraConfig) -> None:
        super().__init__(site, config)
        self.rank = pattern_value(config.rank_pattern, site.target, config.r)
        self.is_lookup = self.geometry.name == "embedding"
        infix = "embedding_" if self.is_lookup else ""
        self.A, self.B = f"hira_{infix}A", f"hira_{infix}B"
        self.dropout = 0.0 if self.is_lookup else config.hira_dropout
        groups = getattr(site.layer, "groups", 1)
        if groups > 1:
            raise TargetError(
                f"HiRA cannot adapt {site.path}: the convolution's `groups` (={groups}) must be 1. "
                "Leave it out with `exclude_modules`."
            )

    def tensors(self) -> dict[str, TensorSpec]:
        a, b = self.geometry.factor_shapes(self.site.layer, self.rank)
        return {self.A: TensorSpec(a), self.B: TensorSpec(b)}

    def reset(self, params: Params) -> None:
        A, B = params[self.A], params[self.B]
        init = self.config.init_weights
        # Both are drawn whatever comes of them: PEFT then draws the same numbers from a seed.
        nn.init.normal_(A)
        nn.init.normal_(B)
        if not init:
            return
        if self.is_lookup:
            nn.init.zeros_(A)
            nn.init.normal_(B)
        else:
            if init == "gaussian":
                nn.init.normal_(A, std=1 / self.rank)
            else:
                nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            nn.init.zeros_(B)

    def delta(self, params: Params, W: Tensor | None = None) -> Tensor:
        assert W is not None
        return W * self.geometry.product(self.site.layer, params[self.A], params[self.B])
