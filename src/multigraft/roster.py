"""The roster: which adapters a model has, where they act, and who is active.

One per adapted model, shared by all its adapted layers. It holds indices only; what is true of a
layer is read from the layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet, ref

from torch import nn

from multigraft.averaging import warn_of_unaveraged
from multigraft.config import PeftConfig
from multigraft.containers import AdapterDict, check_name
from multigraft.errors import AdapterNameError, RoutingError, StateError, did_you_mean
from multigraft.graft import Graft
from multigraft.layer import AdaptedLayer
from multigraft.methods import Schedule
from multigraft.prompts import Context
from multigraft.replication import Replication
from multigraft.requantisation import Loss
from multigraft.routing import Route
from multigraft.siblings import Siblings
from multigraft.spans import Spans

if TYPE_CHECKING:
    from multigraft.residency import Residency

_LIVE: WeakKeyDictionary[nn.Module, ref[Roster]] = WeakKeyDictionary()
"""Rosters by root; neither is kept alive."""


class Configs(dict[str, PeftConfig]):
    """Configs by adapter, which other packages see as ``model.peft_config``.

    They take out what they could not load, which is not there: nothing is attached by halves.
    """

    def pop(self, name: str, default: Any = None) -> Any:
        """The config that was there, or ``default``."""
        return super().pop(name, default)


class Roster:
    """Adapters of one base model.

    Args:
        root: the base model.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        _LIVE[root] = ref(self)
        self.configs: dict[str, PeftConfig] = Configs()
        self.layers: dict[str, list[AdaptedLayer]] = {}
        self.contexts = AdapterDict()
        """Adapters that change the context; a child of every handle while there are any."""
        self.handles: WeakSet[nn.Module] = WeakSet()
        self.active: tuple[str, ...] = ()
        self.enabled = True
        self.route: Route | None = None
        self.spans: Spans | None = None
        """Where adapters with invocation tokens act in the present call."""
        self.trainable: dict[str, None] = {}
        """Adapters that were thawed here and not frozen since."""
        self.merged_layers: dict[AdaptedLayer, None] = {}
        """Layers that something is merged into; each notes itself."""
        self.schedules: dict[str, Schedule] = {}
        """What changes adapters in training besides the optimiser, since its first step."""
        self.hidden: list[Any] = []
        """Merged values that are out of the base while adapters are disabled."""
        self.penalises = True
        """Whether the losses that forwards give hold what methods add to them."""
        self.losses: dict[str, Loss] = {}
        """What quantising merged weights again lost, by the tensor's path."""
        self.residency: Residency | None = None
        """What keeps adapters that are not needed on the CPU, if that is wanted."""
        self.replication: Replication | None = None
        """The list of layers that stands in for the base's own, if one does."""
        self.batchable: dict[str, list[AdaptedLayer]] = {}
        """Adapters that were found able to serve single rows, with the layers that they had."""
        self.siblings: dict[str, Siblings] = {}
        """Adapted layers of one parent, by its path."""
        self.thawed: list[nn.Parameter] = []
        """Base parameters that were trainable before the first adapter froze the base."""
        self.in_place = True
        """Whether the model itself was adapted, rather than by a handle that saves its adapters."""
        self.averaged: frozenset[str] | None = None
        """Adapters whose gradients a wrapper around the model averages over processes, if any."""

    @staticmethod
    def of(root: nn.Module) -> Roster:
        """The roster of this model: the one that handles to it hold, with or without adapters."""
        known = _LIVE.get(root)
        return (known() if known is not None else None) or Roster(root)

    def __getstate__(self) -> dict[str, Any]:
        """All but the handles: a copy's own ones make themselves known."""
        return {name: value for name, value in self.__dict__.items() if name != "handles"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copied or unpickled roster is known as its own root's."""
        self.__dict__.update(state)
        self.handles = WeakSet()
        _LIVE[self.root] = ref(self)

    def acting(self) -> tuple[str, ...]:
        """The adapters that forwards without a route use."""
        return self.active if self.enabled else ()

    def acts(self, adapter: str) -> bool:
        """Whether this adapter acts on whole batches now."""
        return self.route is None and adapter in self.acting()

    @property
    def merged(self) -> list[str]:
        """Adapters that are merged at any layer."""
        inside = {g.adapter for layer in self.merged_layers for g in layer.merged_grafts}
        return [n for n in self.configs if n in inside] if inside else []

    @property
    def first_active(self) -> str:
        """The adapter that stands for the active ones where only one can.

        Raises:
            StateError: none is active.
        """
        if not self.active:
            known = ", ".join(f"`{n}`" for n in self.configs) or "none"
            raise StateError(f"no adapter is active; set_adapter() one. There are: {known}.")
        return self.active[0]

    def names(self) -> list[str]:
        """Every adapter's name.

        Raises:
            StateError: there is none.
        """
        if not self.configs:
            raise StateError(f"{type(self.root).__name__} has no adapters; add one first.")
        return list(self.configs)

    def require(self, names: str | Iterable[str]) -> list[str]:
        """The names as a list without repeats.

        Raises:
            AdapterNameError: there is no such adapter.
        """
        if isinstance(names, (str, bytes)) or not isinstance(names, Iterable):
            names = [names]
        wanted = list(names)
        for name in wanted:
            if not isinstance(name, str) or name not in self.configs:
                known = ", ".join(f"`{n}`" for n in self.configs) or "none"
                raise AdapterNameError(
                    f"no adapter is called `{name}`.{did_you_mean(str(name), self.configs)} "
                    f"There are: {known}."
                )
        return list(dict.fromkeys(wanted))

    def require_one(self, name: str) -> str:
        """The name itself.

        Raises:
            AdapterNameError: there is no such adapter, or these are several.
        """
        if not isinstance(name, str):
            raise AdapterNameError(f"adapter name (={name!r}) must be one string.")
        return self.require(name)[0]

    def require_free(self, name: str) -> str:
        """The name itself, when a new adapter may have it.

        Raises:
            AdapterNameError: it is taken or cannot name a folder.
        """
        if check_name(name) in self.configs:
            raise AdapterNameError(
                f"adapter `{name}` exists on this model. Choose another name, or call "
                f"delete_adapter({name!r}) first."
            )
        return name

    def touched(self, names: Iterable[str]) -> list[AdaptedLayer]:
        """The layers at which any of these adapters acts, each once."""
        found = {id(x): x for name in names for x in self.layers.get(name, ())}
        return list(found.values())

    def grafts(self, name: str) -> Iterator[tuple[AdaptedLayer, Graft]]:
        """Every graft of one adapter, with its layer, in the model's order."""
        for layer in self.layers[name]:
            for graft in layer.grafts[name]:
                yield layer, graft

    def context_of(self, name: str) -> Context | None:
        """What the adapter puts into the context, if it is of that kind."""
        found = self.contexts[name] if self.contexts._modules and name in self.contexts else None
        return found if isinstance(found, Context) else None

    def acting_context(self) -> Context | None:
        """The context that calls of the model get now; at most one adapter's."""
        if self.contexts._modules and self.route is None:
            for name in self.acting():
                found = self.context_of(name)
                if found is not None and found.kind != "attention":
                    return found
        return None

    def take_in(self, name: str, context: Context) -> None:
        """Hold an adapter's context, and let every handle of the model show it."""
        self.contexts._modules[self.contexts.key(name)] = context
        context.enter(self, name)
        for handle in self.handles:
            self.show_contexts(handle)

    def let_go(self, name: str) -> None:
        """Undo `take_in`."""
        context = self.context_of(name)
        if context is not None:
            context.leave()
            del self.contexts[name]
            for handle in self.handles:
                self.show_contexts(handle)

    def show_contexts(self, handle: nn.Module) -> None:
        """Let ``prompt_encoder`` be a child of the handle exactly while there are contexts."""
        self.handles.add(handle)
        if self.contexts._modules:
            handle._modules["prompt_encoder"] = self.contexts
        else:
            handle._modules.pop("prompt_encoder", None)

    def check_together(self, names: Sequence[str], without: Sequence[str] = ()) -> None:
        """Fail unless these adapters can act together, once ``without`` are unmerged.

        Raises:
            StateError: two of them would replace the same module, or the like.
        """
        contexts = [(n, c) for n in names if (c := self.context_of(n)) and c.kind != "attention"]
        if len(contexts) > 1:
            which = ", ".join(f"`{name}` ({c.name})" for name, c in contexts)
            raise StateError(
                f"adapters {which} each put tokens of their own before the input, and only one "
                "can be active at a time. Activate one of them; weight adapters may stand beside."
            )
        for layer in self.touched(names):
            layer.plan_for(names, [g for g in layer.merged_grafts if g.adapter not in without])

    def set_active(self, names: Sequence[str]) -> None:
        """Make exactly these adapters active; checks every layer before any changes.

        Raises:
            StateError: two of them cannot act together.
        """
        self.check_together(names)  # even while disabled: enabling them again must not fail
        layers = self.touched({*self.active, *names})
        acting = tuple(names) if self.enabled else ()
        plans = [layer.plan_for(acting, layer.merged_grafts) for layer in layers]
        self.active = tuple(names)
        self.need(names)
        for layer, plan in zip(layers, plans, strict=True):
            layer.plan = plan

    def set_requires_grad(self, names: Iterable[str], requires_grad: bool) -> None:
        """Freeze or thaw the trainable parameters of these adapters, and of no others."""
        names = list(names)
        if requires_grad and self.averaged is not None:
            warn_of_unaveraged(self.averaged, names)
        self.need(names if requires_grad else ())
        for name in names:
            if requires_grad:
                self.trainable[name] = None
            else:
                self.trainable.pop(name, None)
            for parameter in self.parameters(name):
                if parameter.is_floating_point():
                    parameter.requires_grad_(requires_grad)

    def parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Every parameter of one adapter that training may change."""
        for _, graft in self.grafts(name):
            yield from graft.parameters()
        context = self.context_of(name)
        if context is not None:
            yield from context.parameters()

    def trains(self, name: str) -> bool:
        """Whether any of this adapter's parameters requires gradients."""
        return any(p.requires_grad for p in self.parameters(name))

    def check_batchable(self, name: str) -> None:
        """Fail when one of the adapter's methods cannot serve single rows of a batch.

        Raises:
            RoutingError: names the method.
        """
        context = self.context_of(name)
        if context is not None:
            raise RoutingError(
                f"`adapter_names`: `{name}` is a {context.name}, which changes the context of a "
                "whole batch. Give it a batch of its own with set_adapter()."
            )
        if self.batchable.get(name) is self.layers[name]:
            return
        for _, graft in self.grafts(name):
            if not graft.method.batchable:
                raise RoutingError(
                    f"`adapter_names`: `{name}` is a {graft.method.name}, which cannot serve "
                    "single rows of a batch. Give it a batch of its own with set_adapter()."
                )
            if not graft.site.takes_rows:
                raise RoutingError(
                    f"`adapter_names`: `{name}` acts on {graft.site}, where the rows of a batch "
                    "cannot be told apart. Give it a batch of its own with set_adapter()."
                )
        self.batchable[name] = self.layers[name]

    def need(self, names: Sequence[str]) -> None:
        """Bring these adapters' tensors to their layers, if they wait elsewhere."""
        if self.residency is not None and names:
            self.residency.need(names)

    def forget_stacks(self) -> None:
        """What a route has stacked of adapters is no longer theirs: something of them changes."""
        if self.route is not None:
            self.route.companies.clear()

    def siblings_of(self, path: str) -> Siblings:
        """The adapted layers that have the same parent as the one at this path."""
        parent = path.rpartition(".")[0]
        if parent not in self.siblings:
            self.siblings[parent] = Siblings(parent)
        return self.siblings[parent]

    @contextmanager
    def routed(self, route: Route | None) -> Iterator[None]:
        """Let this route decide, for the length of the block."""
        self.need(route.adapters if route is not None else ())
        before, self.route = self.route, route
        try:
            yield
        finally:
            self.route = before
