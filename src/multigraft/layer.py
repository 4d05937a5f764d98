"""The adapted layer: the base layer and every adapter of its site, in parallel.

        x ──┬─────────────► base layer ────────► (+) ──► y
            ├──► adapter "a" ───────────────────► │
            └──► adapter "b" ───────────────────► │

Each adapter's contribution is a function of ``x`` and of the base layer alone; none ever sees
another's output. What a forward does is a `Plan`, made when adapters are added, activated or
merged, and not on every call.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from multigraft import draws
from multigraft.containers import AdapterDict, hold
from multigraft.effective import effective, held, touched
from multigraft.errors import NestingError, RoutingError, StateError
from multigraft.facade import LayerFacade
from multigraft.fused import fused
from multigraft.graft import Graft
from multigraft.kernels import IS_TRACED
from multigraft.mixed import run_rows
from multigraft.siblings import MANY_TOKENS
from multigraft.storage import storage_of

if TYPE_CHECKING:
    from multigraft.roster import Roster


@dataclass(frozen=True)
class Plan:
    """What one forward does, in this order; empty means the base layer and nothing else.

    Args:
        inputs: maps of what the base layer sees.
        stand_in: the trained copy that takes the base layer's place.
        rebinds: base tensors that are changed for the call, with who changes them.
        outputs: maps of what the base layer gives.
        deltas: what is added, each a function of the layer's own input.
        shown: base tensors that whoever reads them is shown with adapters in them.
    """

    inputs: tuple[Graft, ...] = ()
    stand_in: Graft | None = None
    rebinds: tuple[tuple[str, tuple[Graft, ...]], ...] = ()
    outputs: tuple[Graft, ...] = ()
    deltas: tuple[Graft, ...] = ()
    shown: Mapping[str, tuple[Graft, ...]] = field(default_factory=dict)
    is_additive: bool = True
    needs_base: bool = False
    by_token: bool = False

    @staticmethod
    def of(grafts: Iterable[Graft], is_read: bool = False) -> Plan:
        """The plan in which these grafts, and no others, act.

        Args:
            is_read: a parent may read the layer's tensors rather than run it.
        """
        parts: dict[str, list[Graft]] = {"map": [], "replace": [], "additive": []}
        rebinds: dict[str, list[Graft]] = {}
        shown: dict[str, list[Graft]] = {}
        for graft in grafts:
            if graft.site.rebinds or is_read:
                for name in touched(graft):
                    shown.setdefault(name, []).append(graft)
                    if graft.site.rebinds:
                        rebinds.setdefault(name, []).append(graft)
            if not graft.site.rebinds:
                parts[graft.method.kind].append(graft)
        maps = tuple(parts["map"])
        stand_in = parts["replace"][0] if parts["replace"] else None
        return Plan(
            inputs=maps,
            stand_in=stand_in,
            rebinds=tuple((name, tuple(who)) for name, who in rebinds.items()),
            outputs=maps,
            deltas=tuple(parts["additive"]),
            shown={name: tuple(who) for name, who in shown.items()},
            is_additive=not (maps or stand_in or rebinds),
            needs_base=any(graft.method.needs_base for graft in parts["additive"]),
            by_token=any(graft.method.by_token for graft in parts["additive"]),
        )


class AdaptedLayer(LayerFacade, nn.Module):
    """The one wrapper. Only `multigraft.wrap` makes it and puts it in or out of a model.

    Args:
        base_layer: a layer of the base model; an adapted layer is refused.
        path: its dotted path in the base model.
        roster: who is active in this model; shared by all its adapted layers.
        is_read: a parent may read the layer's tensors rather than run it.

    Raises:
        NestingError: ``base_layer`` is, or contains, an adapted layer.
    """

    def __init__(
        self, base_layer: nn.Module, path: str, roster: Roster, is_read: bool = False
    ) -> None:
        super().__init__()
        if any(isinstance(m, AdaptedLayer) for m in base_layer.modules()):
            raise NestingError(
                f"{path}: an adapted layer cannot be wrapped in, or around, another one; "
                "adapters stand side by side on the base layer. Add the adapter to the model."
            )
        self.base_layer = base_layer
        self.path = path
        self.storage = storage_of(base_layer)
        self.roster = roster
        self.is_read = is_read
        self.siblings = roster.siblings_of(path)
        self.grafts: dict[str, list[Graft]] = {}
        self.kept: dict[str, Any] = {}
        self.parted: dict[str, nn.Parameter] = {}
        self._merged: list[Graft] = []
        self.plan = Plan()
        self.training = base_layer.training

    @property
    def merged_grafts(self) -> list[Graft]:
        """What is in the base layer's own tensors now, as it was when it was merged."""
        return self._merged

    @merged_grafts.setter
    def merged_grafts(self, grafts: list[Graft]) -> None:
        self._merged = grafts
        if grafts:
            self.roster.merged_layers[self] = None
        else:
            self.roster.merged_layers.pop(self, None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base layer's output plus what each acting adapter contributes.

        Args:
            args, kwargs: the base layer's own; the first is its input, e.g. ``(..., in)``.
        """
        if not args:
            args = (kwargs.pop(self._input_name(kwargs)),)
        x, more = args[0], args[1:]
        route = self.roster.route
        block = draws.block() if self.training else None
        if block is None:
            return self._run(x, more, kwargs, route)
        acting = self.roster.acting() if route is None else ()
        with block.called(self.path, self.siblings.input_of(self), acting):
            return self._run(x, more, kwargs, route)

    def _run(self, x: Any, args: Any, kwargs: Any, route: Any) -> Any:
        if not (args or kwargs) and self._may_share(x, route):
            y = self.siblings.run(self, x, route)
            if y is not None:
                return y
        if route is not None:
            return run_rows(self, route, x, args, kwargs)
        return self.run(self.plan, x, args, kwargs)

    def _may_share(self, x: Any, route: Any) -> bool:
        """Whether this is a plain call of this very module that others may gain from."""
        is_traced = torch.compiler.is_compiling()
        return (
            type(x) is Tensor
            and (IS_TRACED or not is_traced)
            and (
                route is not None
                or is_traced
                or torch.is_grad_enabled()
                or x.numel() >= MANY_TOKENS * x.shape[-1]
            )
            and not torch._C._are_functorch_transforms_active()
            and "_is_replica" not in self.__dict__
        )

    def _input_name(self, kwargs: Mapping[str, Any]) -> str:
        """The name of the base layer's input, when it is given by name.

        Raises:
            TypeError: it is not among these.
        """
        first = next(iter(inspect.signature(self.base_layer.forward).parameters), None)
        if first is None or first not in kwargs:
            raise TypeError(f"{self.path}: the layer's first argument (`{first}`) is missing.")
        return first

    def run(self, plan: Plan, x: Tensor, args: Any, kwargs: Any) -> Any:
        """The layer's output for ``x`` by this plan."""
        if plan.is_additive and plan.deltas and not (args or kwargs):
            whole = fused(plan.deltas, x, self.training)
            if whole is not None:
                return whole
        with draws.own_numbers(x):
            return self._parts(plan, x, args, kwargs)

    def _parts(self, plan: Plan, x: Tensor, args: Any, kwargs: Any) -> Any:
        seen = x
        for graft in plan.inputs:
            seen = graft.method.input(graft.params, seen)
        layer = self.base_layer
        if plan.stand_in is not None and plan.stand_in.stand_in is not None:
            layer = plan.stand_in.stand_in
        if plan.rebinds:
            y = functional_call(layer, self._rebound(plan, layer), (seen, *args), kwargs)
        else:
            y = layer(seen, *args, **kwargs)
        more: tuple[Any, ...] | None = None
        if plan.deltas and isinstance(y, tuple):  # Megatron's layers give their bias beside
            y, more = y[0], y[1:]
        base = None
        if plan.needs_base:
            base = y if plan.is_additive else self.base_layer(x, *args, **kwargs)
        for graft in plan.outputs:
            y = graft.method.output(graft.params, y)
        for graft in plan.deltas:
            where = self.where(graft, x) if plan.by_token else None
            y = graft.add(y, x, self.training, base, where)
        return y if more is None else (y, *more)

    def where(self, graft: Graft, x: Tensor) -> Tensor | None:
        """Where this graft acts, as `Spans.where` says it; None for everywhere.

        Raises:
            StateError: it acts on some tokens, and the layer runs outside any call of the model.
        """
        if not graft.method.by_token:
            return None
        if self.roster.spans is None:
            raise StateError(
                f"{self.path}: `{graft.adapter}` acts from its invocation tokens on, and where "
                "they are is known inside a call of the model alone. Call the PeftModel, and let "
                "gradient_checkpointing_enable() checkpoint its blocks."
            )
        return self.roster.spans.where(graft.adapter, x, self.path)

    def plan_of(self, adapters: Sequence[str]) -> Plan:
        """The plan in which these adapters act, and no others."""
        return Plan.of(self.grafts_of(adapters), self.is_read)

    def grafts_of(self, adapters: Iterable[str]) -> list[Graft]:
        """What these adapters have here."""
        return [graft for name in adapters for graft in self.grafts.get(name, ())]

    def _rebound(self, plan: Plan, layer: nn.Module) -> dict[str, Tensor]:
        """The layer's tensors with the changes that these grafts make, relative to the base's own.

        Args:
            layer: the base layer, or what stands in for it.
        """
        return {
            name: effective(name, who, held(layer, name), self.training)
            for name, who in plan.rebinds
        }

    def show(self, name: str) -> Tensor | None:
        """A tensor of the layer, by name, as a parent that reads it must see it.

        Raises:
            RoutingError: each row of the batch would have to see another one.
        """
        route = self.roster.route
        grafts = self.shown().get(name)
        if grafts and route is not None:
            raise RoutingError(
                f"{self.path}: its parent reads `{name}` rather than run the layer, so the rows of "
                "one batch cannot have adapters of their own. Switch the fast path off "
                "(torch.backends.mha.set_fastpath_enabled(False)), or run each adapter's rows in a "
                "batch of their own."
            )
        value = held(self._standing() if route is None else self.base_layer, name)
        if not grafts or value is None:
            return value
        return effective(name, grafts, value, self.training)

    def shown(self) -> Mapping[str, tuple[Graft, ...]]:
        """The tensors that adapters change for whoever reads them now, and who does."""
        route = self.roster.route
        if route is None:
            return self.plan.shown
        return self.plan_of(route.adapters).shown

    def replan(self) -> None:
        """Decide what forwards do from now on; called whenever the roster or a merge changes."""
        self.plan = self.plan_for(self.roster.acting(), self.merged_grafts)

    def plan_for(self, acting: Sequence[str], merged: Sequence[Graft]) -> Plan:
        """The plan for these acting adapters while these grafts are in the base's weights.

        Raises:
            StateError: two adapters would replace the layer, or a map would act on a base that
                another adapter is merged into.
        """
        inside = {(g.adapter, str(g.site)) for g in merged}
        outside = [
            graft
            for adapter in acting
            for graft in self.grafts.get(adapter, ())
            if (adapter, str(graft.site)) not in inside
        ]
        stand_ins = [g for g in (*outside, *merged) if g.method.kind == "replace"]
        if len({g.adapter for g in stand_ins}) > 1:
            names = ", ".join(f"`{g.adapter}`" for g in stand_ins)
            kinds = ", ".join(f"`{k}`" for k in sorted({g.method.prefix for g in stand_ins}))
            raise StateError(
                f"{self.path}: adapters {names} each hold a trained copy of this module "
                f"({kinds}), and only one can take its place. Activate one of them."
            )
        others = {g.adapter for g in merged}
        shares = any(g.tied is not None for g in merged)  # the base's own weight is elsewhere
        for graft in outside:
            needs_base = graft.method.needs_base and not graft.site.rebinds
            needs_own = shares and graft.method.needs_weight and graft.tied is None
            reads_base = graft.method.kind == "map" or needs_base or needs_own
            if reads_base and others - {graft.adapter}:
                raise StateError(
                    f"{self.path}: `{graft.adapter}` ({graft.method.name}) works on the base "
                    f"layer's own output, which is not at hand while {sorted(others)} are merged "
                    "into it. Unmerge them first."
                )
        # A copy stands in for the base, so what is merged into the base must be added to it.
        copied = tuple(g.site.key_of("") for g in outside if g.method.kind == "replace")
        additive = [g for g in merged if g.method.kind == "additive"]
        outside += [g for g in additive if g.site.key.startswith(copied)]
        return Plan.of(outside, self.is_read)

    def add(self, graft: Graft, tensors: dict[str, Tensor]) -> None:
        """Register one adapter's tensors here; the caller has checked that the name is free."""
        self.roster.forget_stacks()
        graft.site.kept, graft.site.peers = self.kept, self.grafts
        self.grafts.setdefault(graft.adapter, []).append(graft)
        self.siblings.join(self)
        for name, tensor in tensors.items():
            group, _, leaf = name.partition(".")
            owner, key = self._group(group).place(graft.adapter, graft.site.label, leaf)
            hold(owner, key, tensor)
            graft.owners[name] = (owner, key)
        if graft.tied is not None:
            graft.owners = graft.tied.owners
        if graft.shared is not None:
            container = self._group(f"{graft.method.prefix}shared")
            container._modules[container.key(graft.adapter)] = graft.shared.leaf
            graft.owners |= {name: (graft.shared.leaf, name) for name in graft.shared.specs}

    def add_buffer(self, graft: Graft, name: str, tensor: Tensor) -> None:
        """Register one more tensor of a graft here, which no state dict shows."""
        owner, key = self._group(name).place(graft.adapter, graft.site.label, "")
        hold(owner, key, tensor)
        owner._non_persistent_buffers_set.add(key)
        graft.owners[name] = owner, key

    def add_stand_in(self, graft: Graft, module: nn.Module) -> None:
        """Register a trained copy of the base layer under ``modules_to_save.<adapter>``."""
        self.roster.forget_stacks()
        graft.site.kept = self.kept
        self.grafts.setdefault(graft.adapter, []).append(graft)
        self.siblings.join(self)
        owner, key = self._group(graft.method.prefix).place(graft.adapter, graft.site.label, "")
        owner._modules[key] = module
        graft.stand_in = module
        for name in module.state_dict():
            owner_path, _, leaf = name.rpartition(".")
            graft.owners[name] = (module.get_submodule(owner_path), leaf)

    def remove(self, adapter: str) -> list[Graft]:
        """Take one adapter's tensors out; returns its grafts, with their tensors still held."""
        self.roster.forget_stacks()
        grafts = self.grafts.pop(adapter, [])
        if not self.grafts:
            self.siblings.leave(self)
        for group, container in list(self._modules.items()):
            if isinstance(container, AdapterDict):
                del container[adapter]
                if container.is_empty:
                    del self._modules[group]
        return grafts

    def all_grafts(self) -> Iterator[Graft]:
        """Every graft of every adapter here."""
        return (graft for grafts in self.grafts.values() for graft in grafts)

    def _group(self, name: str) -> AdapterDict:
        container = self._modules.get(name)
        if not isinstance(container, AdapterDict):
            container = self._modules[name] = AdapterDict()
            container.training = self.training
        return container
