"""Riemannian preconditioned LoRA: gradients scaled by the other factor's Gram matrix.

    G_A' = (Bᵀ B + reg I)⁻¹ G_A        G_B' = G_B (A Aᵀ + reg I)⁻¹

A: (rank, in)   B: (out, rank)

Paper: Zhang and Pilanci 2024, arXiv:2402.02347, eq. 2 and algorithm 1.
Departs: stacked experts are preconditioned each by itself, where PEFT mixes them.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from multigraft.errors import StateError, UnsupportedError
from multigraft.graft import Graft
from multigraft.optimizers.factors import (
    check_class,
    check_number,
    factors,
    gram_inverse,
    lora_grafts,
    on_pairs,
    trainable,
)

WHERE = "create_riemannian_optimizer"


def create_riemannian_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    reg: float = 1e-2,
    **kwargs: Any,
) -> Optimizer:
    """An ``optimizer_cls`` over what trains in ``model`` that sees preconditioned gradients.

    It is an optimiser of that very class, with two hooks on its step: the first puts the
    preconditioned gradients in the place of the pairs' own, the second gives these back. Pairs of
    convolutions and embeddings, and whatever is no pair, keep their gradients, as in PEFT. A
    closure is run once, before.

    Args:
        reg: the damping; it keeps the inverse finite while B is zero.
        kwargs: the optimiser's own.

    Raises:
        ConfigError: an argument is out of range.
        StateError: no pair of LoRA trains.
        UnsupportedError: the class runs closures itself (L-BFGS): what it knows of the curvature
            would be that of other gradients.
    """
    check_class(WHERE, optimizer_cls)
    check_number(WHERE, "reg", reg, above=-1e-300)
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UnsupportedError(
            f"{WHERE}: {optimizer_cls.__name__} needs a closure and evaluates it within a step, "
            "where gradients cannot be preconditioned. Use SGD, AdamW or the like."
        )
    grafts = [graft for graft in lora_grafts(model) if _is_product(graft)]
    if not grafts:
        raise StateError(
            f"{WHERE}: no pair of LoRA's factors trains in the model. Activate a LoRA adapter."
        )
    optimizer = optimizer_cls([p for _, p in trainable(model)], **{"lr": lr, **kwargs})
    hooks = _Preconditioner(grafts, reg)
    optimizer.register_step_pre_hook(hooks.before)
    optimizer.register_step_post_hook(hooks.after)
    return optimizer


def _is_product(graft: Graft) -> bool:
    A, B = factors(graft)
    return (
        A.ndim == B.ndim == 2
        and graft.method.geometry.name != "embedding"
        and (A.requires_grad and B.requires_grad)
    )


class _Preconditioner:
    """The hooks, and the pairs' own gradients for the length of a step."""

    def __init__(self, grafts: list[Graft], reg: float) -> None:
        self.grafts = grafts
        self.reg = reg
        self.own: list[tuple[Tensor, Tensor]] = []

    def before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Evaluate the closure, if any, and put the preconditioned gradients in place."""
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            args, kwargs = args[:1], {**kwargs, "closure": lambda: loss}
        self.own = []
        for graft in self.grafts:
            A, B = factors(graft)
            for factor, gradient in zip((A, B), self._preconditioned(graft, A, B), strict=True):
                if factor.grad is not None:
                    self.own.append((factor, factor.grad))
                    factor.grad = gradient.to(factor.grad.dtype)
        return args, kwargs

    def after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Give the pairs their own gradients back."""
        for factor, gradient in self.own:
            factor.grad = gradient
        self.own = []

    @torch.no_grad()
    def _preconditioned(self, graft: Graft, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Both gradients, in at least float32; zeros where a factor has none."""
        dtype = torch.promote_types(A.dtype, torch.float32)
        grads = [
            torch.zeros_like(f, dtype=dtype) if f.grad is None else f.grad.to(dtype) for f in (A, B)
        ]
        layer, geometry = graft.site.layer, graft.method.geometry
        a, b = geometry.pairs(layer, A.to(dtype), B.to(dtype))
        of_a, of_b = gram_inverse(b.mT, self.reg), gram_inverse(a, self.reg)
        return on_pairs(graft, lambda ga, gb: (of_a @ ga, gb @ of_b), *grads)
