"""Monte Carlo low-rank adaptation (MonteCLoRA): A is sampled around itself in training.

    A' = A + Σ_n π_n E_nᵀ        E_n = ε · Z_n diag(v)^½        Z_n ~ N(0, 1): (in, rank)
    v  = e^{2σ} χ,  χ_j ~ χ²(rank)                              the diagonal of a Wishart sample
    π  = softmax(μ(α) + Σ(α)^½ z),  α = e^w                     a Dirichlet sample, approximately

σ: (rank,), ``std_prior``; w: (samples,), ``expert_weights_prior``; both are trained. The loss gets,
as a mean over sites, κ (KL of π + KL of the Wishart + KL of the samples) + ‖π‖² with `use_entropy`.
In evaluation, in merging and in files it is the LoRA of A and B.

Numbers are drawn from torch's own generator at every forward: `torch.manual_seed` decides them, and
a layer that gradient checkpointing runs again draws the same.

Paper: Sengupta et al. 2024, arXiv:2411.04358, sections 3 and 4.
Departs: the Dirichlet's divergence has the sign that makes it one; PEFT 0.21 adds a term of it that
is to be subtracted. `buffer_size`, the number of samples that PEFT draws ahead, has no effect.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from multigraft.config import require
from multigraft.draws import dropout
from multigraft.methods.contract import Method, Params, TensorSpec
from multigraft.variants._plain import add_bias, add_pair, factors, only_linear
from multigraft.variants.contract import Variant, variant

_SAMPLER = "lora_monteclora_sampler"
STD, WEIGHTS = f"{_SAMPLER}.std_prior", f"{_SAMPLER}.expert_weights_prior"
VARIANCE, MIXTURE = f"{_SAMPLER}.gaussian_var_prior", f"{_SAMPLER}.expert_weights"
CHI, NORMAL = f"{_SAMPLER}.chi_draw", f"{_SAMPLER}.dirichlet_draw"


@dataclass
class MontecloraConfig:
    """MonteCLoRA's options, under PEFT's names.

    Args:
        num_samples: samples of A in each forward.
        use_entropy: keep the samples' weights from collapsing into one.
        dirichlet_prior: concentration of the weights' prior.
        sample_scaler: size of the samples' deviation from A.
        kl_loss_weight: weight of the divergences in the loss.
        buffer_size: PEFT's; has no effect here.
    """

    num_samples: int = 8
    use_entropy: bool = False
    dirichlet_prior: float = 0.1
    sample_scaler: float = 1e-4
    kl_loss_weight: float = 1e-5
    buffer_size: int = 150

    def __post_init__(self) -> None:
        where = "MontecloraConfig"
        for name in ("num_samples", "buffer_size"):
            value = getattr(self, name)
            is_count = isinstance(value, int) and not isinstance(value, bool) and value > 0
            require(is_count, where, name, value, "an integer of at least 1")
        is_switch = isinstance(self.use_entropy, bool)
        require(is_switch, where, "use_entropy", self.use_entropy, "True or False")
        for name in ("sample_scaler", "kl_loss_weight", "dirichlet_prior"):
            value = getattr(self, name)
            is_number = isinstance(value, (int, float)) and math.isfinite(value)
            least = "a number above 0" if name == "dirichlet_prior" else "a number of at least 0"
            is_in = is_number and (value > 0 if name == "dirichlet_prior" else value >= 0)
            require(is_in, where, name, value, least)


@variant("monteclora")
class MonteCLoRA(Variant):
    """LoRA with a distribution over A."""

    option = "monteclora_config"
    options = MontecloraConfig

    @classmethod
    def selected(cls, config: Any) -> bool:
        return config.monteclora_config is not None

    def refusal(self, lora: Method) -> str | None:
        return only_linear(lora, "`monteclora_config`")

    def tensors(self, lora: Method) -> dict[str, TensorSpec]:
        n, rank = lora.config.monteclora_config.num_samples, lora.rank
        return {
            STD: TensorSpec((rank,)),
            WEIGHTS: TensorSpec((n,)),
            VARIANCE: TensorSpec((rank, rank), trainable=False, buffer=True),
            MIXTURE: TensorSpec((n,), trainable=False, buffer=True),
            CHI: TensorSpec((rank,), trainable=False, buffer=True, saved=False),
            NORMAL: TensorSpec((n,), trainable=False, buffer=True, saved=False),
        }

    derived = frozenset({CHI, NORMAL})

    def reset(self, lora: Method, params: Params) -> None:
        nn.init.uniform_(params[STD])
        nn.init.uniform_(params[WEIGHTS])
        params[VARIANCE].copy_(torch.eye(lora.rank))
        params[MIXTURE].fill_(1 / len(params[MIXTURE]))
        self.derive(lora, params)

    def derive(self, lora: Method, params: Params) -> None:
        params[CHI].fill_(lora.rank)  # its mean
        params[NORMAL].zero_()

    def low_rank(self, lora: Method, params: Params) -> tuple[Tensor, Tensor, float]:
        return (*factors(lora, params), lora.scaling)

    def trains_as_pair(self, lora: Method) -> bool:
        return False

    def add(
        self,
        lora: Method,
        params: Params,
        y: Tensor,
        x: Tensor,
        training: bool,
        base: Tensor | None,
    ) -> Tensor:
        A, B = factors(lora, params)
        if training:
            x = dropout(x, lora.dropout) if lora.dropout else x
            A = A + self._deviation(lora, params)
        return add_bias(lora, params, add_pair(lora, y, x, A, B, lora.scaling))

    def delta(self, lora: Method, params: Params, W: Tensor | None) -> Tensor:
        return lora.geometry.product(lora.site.layer, *factors(lora, params)) * lora.scaling

    def penalty(self, config: Any, sites: Iterable[Params]) -> Tensor | None:
        options, terms = config.monteclora_config, []
        for params in sites:
            variance, alpha = _variance(params), params[WEIGHTS].exp()
            term = options.kl_loss_weight * (
                dirichlet_kl(alpha, options.dirichlet_prior)
                + wishart_kl(params[STD])
                + len(alpha) * normal_kl(variance)
            )
            if options.use_entropy:
                term = term + _mixture(params).square().sum()
            terms.append(term)
        return torch.stack(terms).mean() if terms else None

    def _deviation(self, lora: Method, params: Params) -> Tensor:
        """How far this forward's A is from A, ``(rank, in)``."""
        in_, _ = lora.geometry.sizes(lora.site.layer)
        Z, chi, z = draws(params[STD], len(params[WEIGHTS]), in_)
        with torch.no_grad():  # what the penalty and the file tell of this forward
            params[CHI].copy_(chi)
            params[NORMAL].copy_(z)
        variance, mixture = _variance(params), _mixture(params)
        with torch.no_grad():
            params[VARIANCE].copy_(variance.diag())
            params[MIXTURE].copy_(mixture)
        E = torch.tensordot(mixture, Z, 1) * variance.sqrt()
        return (E * lora.config.monteclora_config.sample_scaler).T


def draws(like: Tensor, samples: int, in_: int) -> tuple[Tensor, Tensor, Tensor]:
    """One forward's random numbers: Z ``(samples, in, rank)``, χ ``(rank,)``, z ``(samples,)``.

    Args:
        like: a tensor ``(rank,)`` of the dtype and device that they are to have.
    """
    rank = len(like)
    Z = torch.randn(samples, in_, rank, dtype=like.dtype, device=like.device)
    # The diagonal of G Gᵀ for G: (rank, rank), which is a Wishart sample of scale 1.
    chi = torch.randn(rank, rank, dtype=like.dtype, device=like.device).square().sum(1)
    return Z, chi, torch.randn(samples, dtype=like.dtype, device=like.device)


def dirichlet_kl(alpha: Tensor, prior: float) -> Tensor:
    """KL(Dir(alpha) ‖ Dir(prior, …, prior))."""
    beta = torch.full_like(alpha, prior)
    volume = _log_beta(beta) - _log_beta(alpha)
    return volume + ((alpha - beta) * (alpha.digamma() - alpha.sum().digamma())).sum()


def wishart_kl(std: Tensor) -> Tensor:
    """KL(W(rank, diag(e^{2 std})) ‖ W(rank, 1))."""
    return 0.5 * len(std) * ((2 * std).exp() - 2 * std - 1).sum()


def normal_kl(variance: Tensor) -> Tensor:
    """KL(N(0, diag(variance)) ‖ N(0, 1))."""
    variance = variance.clamp_min(1e-6)
    return 0.5 * (variance - variance.log() - 1).sum()


def _log_beta(alpha: Tensor) -> Tensor:
    return alpha.lgamma().sum() - alpha.sum().lgamma()


def _variance(params: Params) -> Tensor:
    """The variance of the last forward, ``(rank,)``; gradients flow to σ."""
    return ((2 * params[STD]).exp() * params[CHI].clone()).clamp_min(1e-3)


def _mixture(params: Params) -> Tensor:
    """The mixture of the last forward, ``(samples,)``; gradients flow to w."""
    alpha = params[WEIGHTS].exp().clamp_min(1e-6)
    n = len(alpha)
    log = alpha.log()
    spread = (1 / alpha) * (1 - 2 / n) + (1 / alpha).sum() / n**2
    spread = spread.clamp_min(1e-6) + 1e-6
    return (log - log.mean() + spread.sqrt() * params[NORMAL].clone()).softmax(0)
