"""LoRA-FA: A is frozen, and B's gradient is the one nearest to full fine-tuning's.

    G_B' = (1 / s²) G_B (A Aᵀ + 1e-8 I)⁻¹ ≈ argmin ‖s X A − G_W‖        G_B = s G_W Aᵀ

A: (rank, in)   B: (out, rank)   s: the pair's scaling   G_W: the gradient of the whole weight.

Paper: Zhang et al. 2023, arXiv:2308.03303, section 3; the projection is PEFT's.
Departs: computed in float32, where PEFT rounds to bfloat16. Pairs of embeddings are trained whole
by AdamW: their A starts at zero, and would stay there. Any other parameter (DoRA's magnitudes,
biases, saved modules) is AdamW's as well; AdamW is that of transformers, which adds ``eps`` to the
root before bias correction and decays after the step.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from multigraft.errors import ConfigError, StateError
from multigraft.graft import Graft
from multigraft.optimizers.factors import (
    check_number,
    factors,
    gram_inverse,
    is_lookup,
    lora_grafts,
    on_pairs,
    rosters,
    trainable,
)

WHERE = "create_lorafa_optimizer"
DAMPING = 1e-8


class LoraFAOptimizer(Optimizer):
    """AdamW that projects the gradients of B and leaves A alone.

    Args:
        params: what trains, as for any optimiser; no A among them.
        lr: learning rate.
        betas: of the running averages of the gradient and of its square.
        eps: added to the denominator.
        weight_decay: decoupled.
        correct_bias: whether running averages are corrected for their start at zero.
        pairs: the LoRAs whose B is among ``params``; their A is frozen until `release`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        *,
        pairs: Iterable[Graft] = (),
    ) -> None:
        where = type(self).__name__
        for name, value in {"lr": lr, "eps": eps, "weight_decay": weight_decay}.items():
            check_number(where, name, value, above=-1e-300)
        if not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(f"{where}: `betas` (={betas}) must be at least 0 and below 1.")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "correct_bias": correct_bias,
        }
        super().__init__(params, defaults)
        self.pairs = list(pairs)
        self.flags = [factors(pair)[0].requires_grad for pair in self.pairs]
        self._freeze()

    def release(self) -> None:
        """Give every A the ``requires_grad`` that it had, and its pair back to other optimisers."""
        for pair, flag in zip(self.pairs, self.flags, strict=True):
            factors(pair)[0].requires_grad_(flag)
        self.pairs, self.flags = [], []

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._freeze()  # activating the adapter thaws all of it
        pairs = {id(factors(pair)[1]): pair for pair in self.pairs}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    pair = pairs.get(id(parameter))
                    gradient = parameter.grad if pair is None else _projected(pair)
                    self._adamw(parameter, gradient, group)
        return loss

    def _freeze(self) -> None:
        for pair in self.pairs:
            A, _ = factors(pair)
            A.requires_grad_(False)
            A.grad = None

    def _adamw(self, parameter: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        beta1, beta2 = group["betas"]
        state["step"] += 1
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.mul_(beta1).add_(gradient, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        size = group["lr"]
        if group["correct_bias"]:
            size *= math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        parameter.addcdiv_(mean, square.sqrt().add_(group["eps"]), value=-size)
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])

    def __getstate__(self) -> dict[str, Any]:
        """Copies keep their pairs, which torch's own state leaves out."""
        return {**super().__getstate__(), "pairs": self.pairs, "flags": self.flags}


def create_lorafa_optimizer(
    model: nn.Module,
    r: int,
    lora_alpha: int,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> LoraFAOptimizer:
    """A LoRA-FA optimiser over what trains in ``model``; freezes every A whose B trains.

    Args:
        r, lora_alpha: kept for PEFT's signature. Each site's own scaling counts, with its patterns
            and what `set_scale` made of it.
        use_rslora: leave it None; another value must be what the active adapters' configs say.

    Raises:
        ConfigError: an argument is out of range, or contradicts the configs.
        StateError: no pair of LoRA trains.
    """
    if use_rslora is not None:
        _check_rslora(model, use_rslora)
    pairs = [g for g in lora_grafts(model) if not is_lookup(g) and factors(g)[1].requires_grad]
    if not pairs:
        raise StateError(f"{WHERE}: no LoRA trains in the model. Activate a LoRA adapter.")
    frozen = {id(factors(pair)[0]) for pair in pairs}
    params = [p for _, p in trainable(model) if id(p) not in frozen]
    return LoraFAOptimizer(params, lr=lr, weight_decay=weight_decay, pairs=pairs)


def _check_rslora(model: nn.Module, use_rslora: bool) -> None:
    others = [
        name
        for roster in rosters(model)
        for name in roster.active
        if bool(getattr(roster.configs[name], "use_rslora", False)) != use_rslora
    ]
    if others:
        raise ConfigError(
            f"{WHERE}: `use_rslora` (={use_rslora}) is not what the configs of {others} say. Leave "
            "it out; the configs decide."
        )
    warnings.warn(
        f"{WHERE}: `use_rslora` is deprecated, in PEFT too; the adapters' configs decide.",
        FutureWarning,
        stacklevel=3,
    )


def _projected(pair: Graft) -> Tensor:
    """B's gradient for a frozen A, in B's dtype."""
    A, B = factors(pair)
    assert B.grad is not None
    scale = pair.method.scaling
    if scale == 0:  # B has no effect, and its gradient is zero
        return B.grad
    dtype = torch.promote_types(A.dtype, torch.float32)

    def change(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return a, (1 / scale**2) * (g @ gram_inverse(a, DAMPING))

    return on_pairs(pair, change, A.to(dtype), B.grad.to(dtype))[1].to(B.grad.dtype)
