"""Which of a model's parameters are what in its adapters: asked of the grafts, never of names."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from multigraft.errors import ConfigError, StateError
from multigraft.graft import Graft
from multigraft.layer import AdaptedLayer
from multigraft.roster import Roster

EMBEDDING = "embedding"


def lora_grafts(model: nn.Module) -> Iterator[Graft]:
    """Every LoRA of every adapter at every site that has tensors of its own."""
    for graft in own_grafts(model):
        if graft.method.name == "LORA":
            yield graft


def own_grafts(model: nn.Module) -> Iterator[Graft]:
    """Every graft with tensors of its own, whatever the model is wrapped in."""
    for roster in rosters(model):
        for name in roster.configs:
            yield from (graft for _, graft in roster.grafts(name) if graft.tied is None)


def rosters(model: nn.Module) -> list[Roster]:
    """Those of the adapted models in this one: one, but for several models in one module."""
    found = (m.roster for m in model.modules() if isinstance(m, AdaptedLayer))
    return list(dict.fromkeys(found))


def factors(graft: Graft) -> tuple[Tensor, Tensor]:
    """A LoRA's A and B, as they are registered now."""
    A, B = graft.method.geometry.factors
    params = graft.params
    return params[A], params[B]


def is_lookup(graft: Graft) -> bool:
    """Whether A is looked up in, row by row, rather than multiplied with."""
    return graft.method.geometry.name == EMBEDDING


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that train, by name in the model.

    Raises:
        StateError: there is none.
    """
    found = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not found:
        raise StateError("no parameter requires gradients; activate an adapter with set_adapter().")
    return found


def gram_inverse(factor: Tensor, damping: float) -> Tensor:
    """``(F Fᵀ + damping I)⁻¹`` for each of ``(n, rank, width)``: ``(n, rank, rank)``."""
    gram = factor @ factor.mT
    gram = gram + damping * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.pinv(gram, hermitian=True)


def on_pairs(
    graft: Graft, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    """What ``change`` makes of A and B (or tensors shaped like them), pair by pair.

    The pairs are those that the layer multiplies independently: one, groups, or experts.
    """
    layer, geometry = graft.site.layer, graft.method.geometry
    new_a, new_b = geometry.from_pairs(layer, *change(*geometry.pairs(layer, a, b)))
    return new_a.reshape(a.shape), new_b.reshape(b.shape)


def check_class(where: str, optimizer_cls: object) -> None:
    """Refuse what is no optimiser class.

    Raises:
        ConfigError: says what it is.
    """
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, torch.optim.Optimizer)):
        raise ConfigError(
            f"{where}: `optimizer_cls` (={optimizer_cls!r}) must be a class of torch.optim, such "
            "as torch.optim.AdamW."
        )


def check_number(where: str, name: str, value: object, *, above: float) -> None:
    """Refuse what is no finite number above this.

    Raises:
        ConfigError: says what it is.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and above < value < float("inf")):  # type: ignore[operator]
        raise ConfigError(f"{where}: `{name}` (={value!r}) must be a finite number above {above}.")
