"""Arrow: each token is routed to those adapters whose direction it points along.

    p_e: the first right singular vector of B_e A_e        (in,)   the prototype of expert e
    c = softmax over the top k of |p_e · x| / temperature          one weight per token and expert
    y = W x + dropout(Σ_e c_e scaling_e B_e A_e x)

The experts are other adapters of the model at the same site, plain pairs, read and never changed.
With GenKnowSub, A_e - mean(A_g) and B_e - mean(B_g) stand in for A_e and B_e, where g runs over
adapters of general knowledge.

Papers: Ostapenko et al. 2024, arXiv:2405.11157; GenKnowSub: Bagherifard et al. 2025, ACL short 54.
Departs: the prototype is exact, unless `rng_seed` asks for PEFT's 15 steps of the power iteration.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from multigraft.config import check_names, require
from multigraft.draws import dropout
from multigraft.errors import StateError
from multigraft.methods.contract import Method, Params, TensorSpec
from multigraft.variants._memo import Memo
from multigraft.variants.contract import Variant, variant

STEPS = 15
"""Of PEFT's power iteration."""


@dataclass
class ArrowConfig:
    """How tokens are routed, and to whom.

    Args:
        top_k: how many experts a token is given to; all, where there are fewer.
        router_temperature: above 1 evens the weights out.
        use_gks: subtract the mean of the general adapters from each expert (GenKnowSub).
        task_adapter_names: the experts; `multigraft.create_arrow_model` fills it in.
        gks_adapter_names: the general adapters; likewise.
        rng_seed: begin PEFT's power iteration with numbers from this seed, for its very prototypes;
            None for exact ones.

    Raises:
        ConfigError: a value is not allowed.
    """

    top_k: int = 3
    router_temperature: float = 1.0
    use_gks: bool = False
    task_adapter_names: list[str] | None = field(default=None, kw_only=True)
    gks_adapter_names: list[str] | None = field(default=None, kw_only=True)
    rng_seed: int | None = None

    def __post_init__(self) -> None:
        where, k, t, seed = "ArrowConfig", self.top_k, self.router_temperature, self.rng_seed
        require(_is_integer(k) and k > 0, where, "top_k", k, "an integer of at least 1")
        is_number = isinstance(t, (int, float)) and not isinstance(t, bool)
        is_temperature = is_number and math.isfinite(t) and t > 0
        require(is_temperature, where, "router_temperature", t, "a finite number above 0")
        require(isinstance(self.use_gks, bool), where, "use_gks", self.use_gks, "True or False")
        require(seed is None or _is_integer(seed), where, "rng_seed", seed, "an integer, or None")
        for name in ("task_adapter_names", "gks_adapter_names"):
            setattr(self, name, check_names(where, name, getattr(self, name)))


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class Expert(NamedTuple):
    """One plain pair that tokens may be given to."""

    A: Tensor
    B: Tensor
    scale: float


class Memory(NamedTuple):
    """What is kept of the experts at one site while they stay as they are."""

    prototypes: Memo
    A: Memo
    B: Memo


@variant("arrow")
class Arrow(Variant):
    """A router over other adapters; A and B of its own are in files alone."""

    option = "arrow_config"
    options = ArrowConfig
    mergeable = False
    identity_at_init = False

    @classmethod
    def selected(cls, config: Any) -> bool:
        return config.arrow_config is not None

    def model_refusal(self, config: Any, model: Any) -> str | None:
        arrow = config.arrow_config
        if not arrow.task_adapter_names:
            return (
                "`arrow_config` names no experts in `task_adapter_names`; name adapters of the "
                "model there, or let create_arrow_model() load them"
            )
        if arrow.use_gks and not arrow.gks_adapter_names:
            return (
                "`use_gks` subtracts the adapters in `gks_adapter_names` of `arrow_config`, and "
                "there are none; name some, or set `use_gks` to False"
            )
        return None

    def refusal(self, lora: Method) -> str | None:
        if not lora.geometry.is_matmul or lora.site.rebinds:
            return (
                "`arrow_config` routes what linear layers that run see; leave this one out with "
                "`exclude_modules`"
            )
        if lora.config.lora_bias:
            return "`arrow_config` has no pair of its own for `lora_bias`; leave it False"
        return None

    def memory(self) -> Memory:
        return Memory(Memo(), Memo(), Memo())

    def tensors(self, lora: Method) -> dict[str, TensorSpec]:
        shapes = lora.geometry.factor_shapes(lora.site.layer, lora.rank)
        names = lora.geometry.factors
        return {n: TensorSpec(s, trainable=False) for n, s in zip(names, shapes, strict=True)}

    def add(
        self,
        lora: Method,
        params: Params,
        y: Tensor,
        x: Tensor,
        training: bool,
        base: Tensor | None,
    ) -> Tensor:
        experts, general = _experts(lora)
        arrow, memory = lora.config.arrow_config, lora.memory  # type: ignore[attr-defined]
        prototypes, A, B = _routed(memory, experts, general, arrow.rng_seed)
        dtype = lora.geometry.input_dtype(x, A)
        weights = _weights(x, prototypes.to(dtype), arrow)
        shares = [
            weights[..., i : i + 1].expand(*weights.shape[:-1], e.A.shape[0]) * e.scale
            for i, e in enumerate(experts)
        ]
        h = lora.geometry.project(lora.site.layer, x, A.to(dtype)) * torch.cat(shares, -1).to(dtype)
        update = lora.geometry.lift(lora.site.layer, h, B.to(dtype))
        if training and lora.dropout:
            update = dropout(update, lora.dropout)
        return y + update.to(y.dtype)

    def delta(self, lora: Method, params: Params, W: Tensor | None) -> Tensor:
        raise StateError("an Arrow router has no ΔW: each token has one of its own")


def _experts(lora: Method) -> tuple[list[Expert], list[Expert]]:
    """The experts and the general adapters at this site."""
    arrow = lora.config.arrow_config
    experts = _pairs(lora, arrow.task_adapter_names)
    if not experts:
        raise StateError(
            f"{lora.site}: none of the router's experts {arrow.task_adapter_names} acts here. Load "
            "them under these names, or delete the router."
        )
    general = _pairs(lora, arrow.gks_adapter_names or ()) if arrow.use_gks else []
    if arrow.use_gks and len({(e.A.shape, e.B.shape) for e in (*experts, *general)}) > 1:
        raise StateError(
            f"{lora.site}: `use_gks` subtracts A and B of {arrow.gks_adapter_names} from those of "
            f"{arrow.task_adapter_names}, which differ in shape. Give all of them one rank."
        )
    if arrow.use_gks and not general:
        raise StateError(
            f"{lora.site}: none of the general adapters {arrow.gks_adapter_names} acts here. Load "
            "them under these names, or set `use_gks` to False."
        )
    return experts, general


def _pairs(lora: Method, names: Sequence[str]) -> list[Expert]:
    """The plain pairs of these adapters at the router's site."""
    found = []
    for name in names:
        for graft in lora.site.peers.get(name, ()):
            if str(graft.site) != str(lora.site) or graft.method.rides:
                continue
            pair = graft.method.low_rank(graft.params)
            if pair is None:
                raise StateError(
                    f"{lora.site}: the expert `{name}` is more than one plain pair "
                    f"({graft.method.title}), which Arrow cannot route to. Leave it out of "
                    "`task_adapter_names` and `gks_adapter_names`."
                )
            found.append(Expert(*pair))
    return found


def _routed(
    memory: Memory, experts: Sequence[Expert], general: Sequence[Expert], seed: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Prototypes ``(experts, in)``, and the stacked factors ``(ranks, in)``, ``(out, ranks)``."""

    def a() -> Tensor:
        mean = torch.stack([g.A for g in general]).mean(0) if general else 0
        return torch.cat([e.A - mean for e in experts])

    def b() -> Tensor:
        mean = torch.stack([g.B for g in general]).mean(0) if general else 0
        return torch.cat([e.B - mean for e in experts], dim=1)

    def prototypes() -> Tensor:
        ranks = [e.A.shape[0] for e in experts]
        pairs = zip(a().split(ranks), b().split(ranks, dim=1), strict=True)
        return torch.stack([prototype(A, B, seed) for A, B in pairs])

    As, Bs = [e.A for e in (*experts, *general)], [e.B for e in (*experts, *general)]
    key = len(experts), seed
    routes = memory.prototypes.get(prototypes, trained=[*As, *Bs], key=key)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*As, *Bs)):
        return routes, a(), b()
    return routes, memory.A.get(a, trained=As, key=key), memory.B.get(b, trained=Bs, key=key)


def prototype(A: Tensor, B: Tensor, seed: int | None) -> Tensor:
    """The first right singular vector of ``B A``, up to its sign, ``(in,)`` in A's dtype.

    Args:
        seed: of the power iteration that finds it; None for the decomposition.
    """
    wide = torch.promote_types(A.dtype, torch.float32)
    a, b = A.to(wide), B.to(wide)
    if seed is None:
        # B = Q R: Q turns left singular vectors alone, and R A is small.
        return torch.linalg.svd(torch.linalg.qr(b).R @ a, full_matrices=False).Vh[0].to(A.dtype)
    source = torch.Generator(device=A.device).manual_seed(seed)
    v = torch.randn(a.shape[1], generator=source, device=A.device).to(wide)
    gram = b.T @ b
    for _ in range(STEPS):
        v = F.normalize(a.T @ (gram @ (a @ v)), dim=0)
    return v.to(A.dtype)


def _weights(x: Tensor, prototypes: Tensor, arrow: ArrowConfig) -> Tensor:
    """Each token's weight for each expert, ``(..., experts)``, in at least float32."""
    alike = F.linear(x.to(prototypes.dtype), prototypes).abs()
    alike = alike.to(torch.promote_types(alike.dtype, torch.float32))
    top, index = alike.topk(min(arrow.top_k, alike.shape[-1]), dim=-1)
    share = torch.softmax(top / arrow.router_temperature, dim=-1)
    return torch.zeros_like(alike).scatter(-1, index, share)
