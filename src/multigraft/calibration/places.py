"""Where a config's adapter sees inputs: the linear layers that run, on a base or a `PeftModel`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from multigraft.errors import TargetError
from multigraft.graft import Graft
from multigraft.initialisations import MATRICES
from multigraft.keys import PREFIX
from multigraft.methods.lora import LoRA, LoraConfig
from multigraft.model import PeftModel
from multigraft.prepare import prepare
from multigraft.site import Site
from multigraft.storage import let_gradients_through
from multigraft.tuner import base_of


@dataclass(frozen=True, eq=False)
class Place:
    """One linear layer that an adapter acts on.

    Args:
        name: what the model that was given calls it, as PEFT's results are keyed.
        path: its base path.
        module: what is run: the layer, or the wrapper around it.
        site: the layer itself.
        rank: the adapter's rank there.
    """

    name: str
    path: str
    module: nn.Module
    site: Site
    rank: int

    @property
    def sizes(self) -> tuple[int, int]:
        """``(in, out)`` of the layer."""
        assert self.site.geometry is not None
        return self.site.geometry.sizes(self.site.layer)

    def weight(self) -> Tensor:
        """The layer's own weight, ``(out, in)``."""
        return self.as_matrix(self.site.weight().detach())

    def as_matrix(self, W: Tensor) -> Tensor:
        """A tensor in the weight's layout as ``(out, in)``."""
        assert self.site.geometry is not None
        return self.site.geometry.as_matrix(self.site.layer, W)


def places_of(model: nn.Module, config: LoraConfig, adapter: str | None = None) -> list[Place]:
    """The linear layers that an adapter acts on, in the model's order.

    Args:
        model: a base model for which the config is meant, adapted or not, or a `PeftModel` that
            has the adapter.
        adapter: its name, in a `PeftModel` that has it.

    Raises:
        TargetError: there is none.
    """
    if adapter is not None and isinstance(model, PeftModel):
        adapted = [(layer, g) for layer, g in model.roster.grafts(adapter) if _is_linear(g)]
        places = [
            Place(PREFIX + g.site.path, g.site.path, layer, g.site, g.method.rank)
            for layer, g in adapted
        ]
    else:
        parts = prepare(base_of(model), "calibration", config).parts
        places = [
            Place(n.site.path, n.site.path, n.spot.wrapper or n.spot.layer, n.site, method.rank)
            for n, method in parts
            if isinstance(method, LoRA) and _runs_linear(n.site)
        ]
    if not places:
        raise TargetError(
            f"{type(model).__name__}: no linear layer among the targets; this initialisation is "
            "for linear layers. Name some in `target_modules`."
        )
    return places


def _is_linear(graft: Graft) -> bool:
    return isinstance(graft.method, LoRA) and _runs_linear(graft.site)


def _runs_linear(site: Site) -> bool:
    return site.geometry is not None and site.geometry.name in MATRICES and not site.rebinds


@contextmanager
def watched(places: Sequence[Place], see: Callable[[Place, Any], None]) -> Iterator[None]:
    """In the block ``see`` is called with each place and its input, before the layer runs."""

    def hook(place: Place) -> Callable[..., None]:
        @torch.no_grad()
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            see(place, args or tuple(kwargs.values())[:1])

        return before

    handles = [p.module.register_forward_pre_hook(hook(p), with_kwargs=True) for p in places]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module, mode: bool = False) -> Iterator[None]:
    """The model in evaluation (or training) mode; every module's own mode afterwards."""
    before = [(module, module.training) for module in model.modules()]
    for module, _ in before:
        module.training = mode
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
        let_gradients_through(base_of(model))  # which evaluating some quantised layers stops
