"""Gradient checkpointing of a base model whose embeddings are frozen."""

from __future__ import annotations

import warnings

from torch import nn

from multigraft.errors import MultigraftWarning


def checkpoints_gradients(base: nn.Module) -> bool:
    """The flag of transformers, which version 5 renamed: asking for the old name there warns."""
    now = getattr(base, "is_activation_checkpointing", None)
    return bool(getattr(base, "is_gradient_checkpointing", False) if now is None else now)


def let_gradients_in(base: nn.Module) -> None:
    """Gradient checkpointing needs an input with gradients; a frozen embedding gives none.

    Where transformers has seen to that already, another hook would only outlive the adapters.
    """
    if getattr(base, "_require_grads_hooks", None) or getattr(base, "_require_grads_hook", None):
        return
    enable = getattr(base, "enable_input_require_grads", None)
    if callable(enable):
        enable()
    else:
        warnings.warn(
            f"{type(base).__name__} checkpoints gradients and has no enable_input_require_grads(); "
            "with a frozen embedding, reentrant checkpointing would give no gradients.",
            MultigraftWarning,
            stacklevel=3,
        )
