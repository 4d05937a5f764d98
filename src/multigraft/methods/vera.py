"""Vector-based random matrix adaptation (VeRA).

    ΔW = diag(b) B diag(d) A        A: (rank, max in)   B: (max out, rank), frozen and shared by
                                    all sites of the adapter; b: (out,)   d: (rank,), trained

Each site uses the first ``in`` columns of A and the first ``out`` rows of B.

Paper: Kopiczko et al. 2023, arXiv:2310.11454, eq. 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multigraft.config import PeftType, TargetedConfig, require
from multigraft.defaults import LORA_TARGETS, Targets
from multigraft.methods.contract import Method, Params, TensorSpec, method
from multigraft.site import Site

TARGETS: Targets = {**LORA_TARGETS, "phi": ["q_proj", "v_proj"]}


@dataclass
class VeraConfig(TargetedConfig):
    """VeRA's options, under PEFT's names.

    Args:
        r: rank of the shared projections; large ones are cheap, since they are not trained.
        projection_prng_key: seed of the projections.
        save_projection: write the projections into the checkpoint, so that it does not depend on
            torch's generator giving the same numbers elsewhere.
        vera_dropout: probability that an element of the adapter's input is dropped in training.
        d_initial: initial value of ``d``.
        fan_in_fan_out: kept for the file format; the layer's own type says how it is stored.
        bias: only ``"none"`` is built.
        init_weights: initial values as in the paper; False leaves ``b`` and ``d`` random.
    """

    peft_type: str | PeftType | None = PeftType.VERA
    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True

    _ours_only: ClassVar[frozenset[str]] = frozenset({"exclude_modules"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.r > 0, "VeraConfig", "r", self.r, "at least 1")
        p = self.vera_dropout
        require(0.0 <= p < 1.0, "VeraConfig", "vera_dropout", p, "at least 0 and below 1")
        require(self.bias == "none", "VeraConfig", "bias", self.bias, '"none"')


@method("VERA", config=VeraConfig, paper="arXiv:2310.11454")
class VeRA(Method):
    """Two trained vectors around two random projections."""

    prefix = "vera_"
    default_targets = TARGETS

    def __init__(self, site: Site, config: VeraConfig) -> None:
        super().__init__(site, config)
        self.rank = config.r
        self.dropout = config.vera_dropout
        self.in_, self.out = self.geometry.sizes(site.layer)

    @classmethod
    def shared_specs(cls, config: VeraConfig, sites: Sequence[Site]) -> dict[str, TensorSpec]:
        sizes = [s.geometry.sizes(s.layer) for s in sites if s.geometry is not None]
        shapes = {
            "vera_A": (config.r, max(in_ for in_, _ in sizes)),
            "vera_B": (max(out for _, out in sizes), config.r),
        }
        return {
            name: TensorSpec(
                shape, buffer=True, saved=config.save_projection, on_disk=f"base_model.{name}"
            )
            for name, shape in shapes.items()
        }

    @classmethod
    def shared_values(cls, config: VeraConfig, sites: Sequence[Site]) -> dict[str, Tensor]:
        generator = torch.Generator("cpu").manual_seed(config.projection_prng_key)
        values = {}
        for name, spec in cls.shared_specs(config, sites).items():
            # He's uniform bound for the fan-in, drawn in this order: PEFT draws the same numbers.
            bound = math.sqrt(6.0 / spec.shape[1])
            values[name] = torch.empty(spec.shape).uniform_(-bound, bound, generator=generator)
        return values

    def tensors(self) -> dict[str, TensorSpec]:
        return {
            "vera_lambda_b": TensorSpec((self.out,)),
            "vera_lambda_d": TensorSpec((self.rank,)),
        }

    def reset(self, params: Params) -> None:
        b, d = params["vera_lambda_b"], params["vera_lambda_d"]
        if self.config.init_weights:
            nn.init.zeros_(b)
            nn.init.constant_(d, self.config.d_initial)
        else:
            nn.init.ones_(b)
            nn.init.normal_(d)

    def apply(self, params: Params, x: Tensor) -> Tensor:
        A, B = params["vera_A"][:, : self.in_], params["vera_B"][: self.out]
        b, d = params["vera_lambda_b"].to(x.dtype), params["vera_lambda_d"].to(x.dtype)
        return b * F.linear(d * F.linear(x, A.to(x.dtype)), B.to(x.dtype))

    def delta(self, params: Params, W: Tensor | None = None) -> Tensor:
        A, B = params["vera_A"][:, : self.in_], params["vera_B"][: self.out]
        M = (params["vera_lambda_b"][:, None] * B) @ (params["vera_lambda_d"][:, None] * A)
        return self.geometry.from_matrix(self.site.layer, M)
