"""What scripts and other packages read from an adapted layer, under PEFT's names.

Everything here is a view: nothing is stored twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.func import functional_call

from multigraft.aliased import is_aliased
from multigraft.containers import AdapterDict
from multigraft.errors import AdapterNameError, ConfigError, StateError
from multigraft.layer_verbs import LayerVerbs

if TYPE_CHECKING:
    from multigraft.graft import Graft
    from multigraft.roster import Roster

_PEFT_GROUPS = frozenset(
    {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"}
)


class LayerFacade(LayerVerbs):
    """PEFT's attributes of a tuner layer; mixed into the adapted layer."""

    if TYPE_CHECKING:
        base_layer: nn.Module
        grafts: dict[str, list[Graft]]
        merged_grafts: list[Graft]
        roster: Roster
        path: str

        def show(self, name: str) -> Tensor | None: ...
        def shown(self) -> Mapping[str, tuple[Graft, ...]]: ...

    def get_base_layer(self) -> nn.Module:
        """The base model's own layer."""
        return self.base_layer

    @property
    def weight(self) -> Tensor:
        """The weight of what stands at this site: the base's, or the active trained copy's.

        With adapters in it where a parent reads it rather than run the layer.
        """
        return self.show("weight")  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The bias of what stands at this site; see `weight`."""
        return self.show("bias")

    @property
    def original_module(self) -> nn.Module:
        """The base layer, under the name that PEFT gives it beside saved modules."""
        return self.base_layer

    @property
    def active_adapters(self) -> list[str]:
        """Adapters that the model has active, in order; disabled ones included."""
        return list(self.roster.active)

    @property
    def active_adapter(self) -> list[str]:
        """The same list, under the name that PEFT's layers have."""
        return self.active_adapters

    @property
    def merged_adapters(self) -> list[str]:
        """Adapters whose change is in the base layer's own tensors now."""
        return list(dict.fromkeys(g.adapter for g in self.merged_grafts))

    @property
    def merged(self) -> bool:
        """Whether any adapter is merged here."""
        return bool(self.merged_grafts)

    @property
    def disable_adapters(self) -> bool:
        """Whether the model's adapters are switched off."""
        return not self.roster.enabled

    @property
    def r(self) -> dict[str, int]:
        """Rank of each adapter."""
        return {name: graft.method.rank for name, graft in self._main()}

    @property
    def lora_alpha(self) -> dict[str, float]:
        """Alpha of each adapter."""
        return {name: graft.method.alpha for name, graft in self._main()}

    @property
    def lora_dropout(self) -> dict[str, float]:
        """Dropout probability of each adapter."""
        return {name: graft.method.dropout for name, graft in self._main()}

    @property
    def scaling(self) -> Scaling:
        """Scaling of each adapter; assignable."""
        return Scaling(self)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Scale the adapter by ``scale`` times what its config says.

        Under the alias an adapter that the model lacks is passed over: other parts of a pipeline
        may have it.
        """
        if adapter in self.roster.configs or not is_aliased():
            self.scaling.by_config(adapter, scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters."""
        self._rescale(scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters, or set it back to what the config says."""
        if scale == 0:
            raise StateError(f"{self.path}: `scale` (=0) cannot be divided by; leave it out.")
        self._rescale(None if scale is None else 1 / scale)

    def _rescale(self, factor: float | None) -> None:
        """Multiply, or set back, the active adapters' scalings: all of them or none."""
        names = [name for name in self.active_adapters if name in self.grafts]
        for name in names:
            self.scaling.check(name, 1.0 if factor is None else factor)
        for name in names:
            if factor is None:
                self.scaling.by_config(name, 1.0)
            else:
                self.scaling.multiply(name, factor)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)  # type: ignore[misc]
        except AttributeError:
            if name in _PEFT_GROUPS:
                return AdapterDict()
            # Protocols are asked of the wrapper itself: a parametrised layer's `__deepcopy__` would
            # make a copy of that layer alone.
            if name == "base_layer" or name.startswith("__"):
                raise
            # Parents read attributes of their layers: sizes, dtypes, flags of quantisers.
            shown = self.shown() if "plan" in self.__dict__ else ()
            if name in shown:
                return self.show(name)
            if any(key.startswith(f"{name}.") for key in shown):
                return Inside(self, name)
            return getattr(self._standing(), name)

    def _standing(self) -> nn.Module:
        plan = self.__dict__.get("plan")
        if plan is not None and plan.stand_in is not None:
            return plan.stand_in.stand_in
        return self.base_layer

    def _main(self) -> Iterator[tuple[str, Graft]]:
        """Each adapter's grafts that act on a weight (not on a bias)."""
        for name, grafts in self.grafts.items():
            yield from (
                (name, g)
                for g in grafts
                if g.method.kind == "additive" and g.site.geometry and not g.method.rides
            )

    def extra_repr(self) -> str:
        return f"adapters={list(self.grafts)}, merged={self.merged_adapters}"


class Inside(nn.Module):
    """A layer inside an adapted one that never runs itself, as its parent must see its tensors.

    Made for each look; it holds nothing.
    """

    def __init__(self, layer: LayerFacade, inner: str) -> None:
        super().__init__()
        self.__dict__ |= {"_layer": layer, "_inner": inner}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward with its tensors as they are seen."""
        prefix = f"{self._inner}."
        names = [n.removeprefix(prefix) for n in self._layer.shown() if n.startswith(prefix)]
        seen = {name: getattr(self, name) for name in names}
        return functional_call(getattr(self._layer._standing(), self._inner), seen, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        layer, inner = self.__dict__["_layer"], self.__dict__["_inner"]
        key = f"{inner}.{name}"
        shown = layer.shown()
        return layer.show(key) if key in shown else getattr(getattr(layer._standing(), inner), name)


class Scaling(MutableMapping[str, float]):
    """The adapters' scalings at one layer, read from and written to the methods themselves.

    An adapter with several sites at the layer (an attention's matrices, the stacks of experts)
    shows the first one's.
    """

    def __init__(self, layer: LayerFacade) -> None:
        self._layer = layer

    def by_config(self, adapter: str, factor: float) -> None:
        """Make it ``factor`` times what the adapter's config says."""
        for graft in self.check(adapter, factor):
            own = type(graft.method)(graft.site, graft.method.config).scaling
            graft.method.scaling = float(factor * own)

    def multiply(self, adapter: str, factor: float) -> None:
        """Make it ``factor`` times what it is."""
        for graft in self.check(adapter, factor):
            graft.method.scaling = float(factor * graft.method.scaling)

    def __getitem__(self, adapter: str) -> float:
        graft = self._grafts(adapter)[0]
        return graft.method.scaling / graft.site.times

    def __setitem__(self, adapter: str, value: float) -> None:
        grafts = self.check(adapter, value)
        if not grafts:
            raise AdapterNameError(
                f"{self._layer.path}: `{adapter}` has no scaling here. There are: {list(self)}."
            )
        for graft in grafts:
            graft.method.scaling = float(value) * graft.site.times

    def __delitem__(self, adapter: str) -> None:
        raise AdapterNameError(f"`{adapter}`: delete adapters with model.delete_adapter(name).")

    def __iter__(self) -> Iterator[str]:
        return iter(dict(self._layer._main()))

    def __len__(self) -> int:
        return len(dict(self._layer._main()))

    def __repr__(self) -> str:
        return repr(dict(self))

    def _grafts(self, adapter: str) -> list[Graft]:
        found = [graft for name, graft in self._layer._main() if name == adapter]
        if not found:
            raise KeyError(adapter)
        return found

    def check(self, adapter: str, value: float) -> list[Graft]:
        """The adapter's grafts here, when its scaling may be set from ``value`` now.

        Raises:
            AdapterNameError: the model has no such adapter.
            StateError: it is merged.
            ConfigError: the value is no finite number.
        """
        self._layer.roster.require_one(adapter)
        is_number = hasattr(value, "__float__") and math.isfinite(float(value))
        if not is_number:
            raise ConfigError(
                f"{self._layer.path}: the scaling of `{adapter}` (={value!r}) must be a finite "
                "number."
            )
        if adapter in self._layer.merged_adapters:
            raise StateError(
                f"{self._layer.path}: the scaling of `{adapter}` cannot change while it is merged "
                "into the base. Call unmerge_adapter() first."
            )
        self._layer.roster.forget_stacks()
        return [graft for name, graft in self._layer._main() if name == adapter]
