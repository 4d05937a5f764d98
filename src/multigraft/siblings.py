"""Layers that read the same input, run as one: q, k and v of an attention, gate and up of an MLP.

    q(x)   computes q, k and v of x in one node
    k(x)   hands out what waits for it
    v(x)   likewise

Which layers may belong together is told by their names under one parent, so that the same model
always computes alike; that they do is looked at in every call. What waits for a layer is handed out
only for the very tensor that it was made from, and while nothing that went into it has changed;
otherwise the layer computes its output itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from multigraft.bank import rate
from multigraft.fused import part_of, run, shares_dropout
from multigraft.kernels import AnyPart, Part
from multigraft.mixed import run_together

if TYPE_CHECKING:
    from multigraft.layer import AdaptedLayer
    from multigraft.routing import Route

MANY_TOKENS = 1024
"""From so many tokens on, inference gains by one narrow product what stacking its factors costs."""
COMPANIES = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("linear_q", "linear_k", "linear_v"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
"""Names under one parent of layers that read one input."""
CROSS = re.compile(r"cross|encoder_att|encdec|enc_dec|attn2$", re.IGNORECASE)
"""Parents whose queries and keys come from different tensors."""


class Output(NamedTuple):
    """One layer's output, and what it holds for."""

    y: Tensor
    plan: Any
    training: bool


class Siblings:
    """The adapted layers of one parent.

    Args:
        parent: its path in the base model.
    """

    def __init__(self, parent: str) -> None:
        self.parent = parent
        self.members: dict[str, AdaptedLayer] = {}
        """Layers with an adapter, by their names under the parent."""
        self.companies: dict[AdaptedLayer, list[AdaptedLayer]] = {}
        """Of layers that were called: they themselves, and those that are to read the same."""
        self.is_split = bool(CROSS.search(parent.rpartition(".")[2]))
        """Whether they turned out not to read the same input."""
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        """What waits stays here: it belongs to a call that is under way."""
        return {"parent": self.parent, "members": self.members, "is_split": self.is_split}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.companies = {}
        self.forget()

    def forget(self) -> None:
        """Drop what waits."""
        self.x: Tensor | None = None
        """The input that outputs wait for."""
        self.state: tuple[Any, ...] = ()
        """Beside it: its version, the gradient mode and the route."""
        self.waiting: dict[AdaptedLayer, Output] = {}

    def join(self, layer: AdaptedLayer) -> None:
        """A layer has its first adapter, or another one."""
        self.members[_name(layer)] = layer
        self.companies.clear()
        self.forget()

    def leave(self, layer: AdaptedLayer) -> None:
        """A layer has no adapter any more."""
        self.members.pop(_name(layer), None)
        self.companies.clear()
        self.forget()

    def input_of(self, layer: AdaptedLayer) -> str:
        """A name of what the layer reads, the same for those that are to read the same."""
        own = _name(layer)
        return f"{self.parent}.{next((n[0] for n in COMPANIES if own in n), own)}"

    def run(self, layer: AdaptedLayer, x: Tensor, route: Route | None) -> Tensor | None:
        """The layer's output for ``x``, or None where it must run by itself."""
        if self.x is not None:
            y = self._waiting(layer, x, route)
            if y is not None:
                return y
        # Traced, they are found anew: what a call would add to the table is what the next one is
        # compiled again for.
        is_traced = torch.compiler.is_compiling()
        layers = self._company(layer) if is_traced else self.companies.get(layer)
        if layers is None:
            layers = self.companies[layer] = self._company(layer)
        if len(layers) < 2 or self.is_split:
            return None
        ys = _unrouted(layers, x) if route is None else run_together(layers, route, x)
        if ys is None:
            return None
        self.x, self.state = x, _state(x, route)
        self.waiting = {
            other: Output(y, other.plan, other.training)
            for other, y in zip(layers[1:], ys[1:], strict=True)
        }
        return ys[0]

    def _company(self, layer: AdaptedLayer) -> list[AdaptedLayer]:
        """This layer and those that are to read the same input."""
        own = _name(layer)
        if self.members.get(own) is not layer:
            return []  # one that stands for it for the time being
        names = next((names for names in COMPANIES if own in names), ())
        others = (self.members.get(name) for name in names if name != own)
        return [layer, *(other for other in others if other is not None)]

    def _waiting(self, layer: AdaptedLayer, x: Tensor, route: Route | None) -> Tensor | None:
        """What waits for this layer, if it is its output for ``x``."""
        found = self.waiting.pop(layer, None)
        if x is not self.x or _state(x, route) != self.state:
            # Not while a checkpoint runs: it must compute again what it has computed.
            if found is not None and not _has_hooks():
                self.is_split = True
            self.forget()
            return None
        if not self.waiting:
            self.forget()
        if found is None or found.plan is not layer.plan or found.training != layer.training:
            return None
        return found.y


def _unrouted(layers: Sequence[AdaptedLayer], x: Tensor) -> list[Tensor] | None:
    """The outputs of layers that the same adapters act on in all rows."""
    parts: list[AnyPart] = []
    rates = set()
    for layer in layers:
        plan = layer.plan
        if not (plan.is_additive and plan.deltas):
            return None
        rates.add(rate(plan.deltas, layer.training))
        part = part_of(plan.deltas, x, layer.training)
        if part is None or part.W.device != x.device:
            return None
        parts.append(part)
    if len(rates) > 1 or len({type(part) for part in parts}) > 1:
        return None
    p = rates.pop()
    if p and not shares_dropout(x, [part for part in parts if isinstance(part, Part)]):
        return None  # each layer drops elements of its own
    return run(parts, x, p)


def _name(layer: AdaptedLayer) -> str:
    return layer.path.rpartition(".")[2]


def _state(x: Tensor, route: Route | None) -> tuple[Any, ...]:
    """What an output for ``x`` depends on besides the layer; inference tensors count no writes."""
    if torch.compiler.is_compiling():
        return ()  # one trace has one route and mode, and what it calls writes to no input
    return 0 if x.is_inference() else x._version, torch.is_grad_enabled(), id(route)


def _has_hooks() -> bool:
    """Whether what is saved for the backward pass goes through hooks, as in a checkpoint."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
