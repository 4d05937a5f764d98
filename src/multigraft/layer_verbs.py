"""PEFT's verbs of a single layer, which transformers and diffusers call on one layer after another.

An adapter is one thing, of the whole model: what is activated, enabled or deleted at one layer is
so at all of them, and the next layer's turn finds it done. Merging is each layer's own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from multigraft.aliased import FLAG, is_aliased
from multigraft.containers import AdapterDict
from multigraft.errors import MultigraftWarning, StateError

if TYPE_CHECKING:
    from multigraft.graft import Graft
    from multigraft.layer import AdaptedLayer
    from multigraft.roster import Roster
    from multigraft.tuner import Tuner


class LayerVerbs:
    """What can be done at an adapted layer, under PEFT's names; a part of its facade."""

    other_param_names: tuple[str, ...] = ()
    """What an adapter has at a layer besides its tensors is not kept there."""

    if TYPE_CHECKING:
        grafts: dict[str, list[Graft]]
        merged_grafts: list[Graft]
        roster: Roster
        path: str

        def all_grafts(self) -> Iterator[Graft]: ...

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """Children of the layer that hold adapters' tensors; casting the base leaves them out."""
        children: dict[str, nn.Module | None] = self.__dict__["_modules"]
        return tuple(n for n, child in children.items() if isinstance(child, AdapterDict))

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these adapters the model's active ones, and trainable unless ``inference_mode``.

        Raises:
            AdapterNameError: there is no such adapter; under the alias it is passed over, as other
                parts of a pipeline may have it.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if is_aliased():
            names = [name for name in names if name in self.roster.configs]
        trained = set() if inference_mode else set(names)
        is_done = self.roster.active == tuple(names) and self.roster.trainable.keys() == trained
        if not is_done:
            self._tuner().set_adapter(names, inference_mode)
        for graft in (g for name in names for g in self.grafts.get(name, ())):
            for parameter in graft.parameters():  # callers freeze and thaw layer by layer as well
                if parameter.is_floating_point():
                    parameter.requires_grad_(not inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Let the model's active adapters act, or give the base's own outputs."""
        if enabled != self.roster.enabled:
            tuner = self._tuner()
            (tuner.enable_adapter_layers if enabled else tuner.disable_adapter_layers)()

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Freeze or thaw these adapters in the whole model.

        Raises:
            AdapterNameError: there is no such adapter.
        """
        self._tuner().set_requires_grad(adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from the whole model; nothing happens where it is gone already."""
        if adapter_name in self.roster.configs:
            delete_for_peft(self._tuner(), adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Merge the active adapters, or those named, into this layer; see `multigraft.merge`.

        Raises:
            StateError: adapters are disabled.
            UnsupportedError, MergeError: as for the whole model; the layer is as it was.
        """
        from multigraft.merge import merge

        names = self._mergeable(adapter_names)
        if names:
            merge(cast("Roster", AtLayer(self._layer())), names, safe=safe_merge)

    def unmerge(self) -> None:
        """Take everything merged out of this layer again, bit for bit.

        Raises:
            StateError: adapters are disabled.
        """
        from multigraft.merge import unmerge_layer

        if self.merged_grafts and not self.roster.enabled:
            raise StateError(f"{self.path}: adapters are disabled; enable them before unmerging.")
        unmerge_layer(self._layer())

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """What must be renamed when transformers loads this adapter's file, relative to the layer.

        Names in a file hold no adapter's name. `multigraft.compat.conversions` puts it where it
        belongs for most of them; these are the others.
        """
        from multigraft.compat.conversions import with_adapter
        from multigraft.keys import memory_name, saved_tensors

        found = {}
        here = f"{self.path}."
        if adapter_name in self.grafts:
            for key, graft, name in saved_tensors(self._layer(), adapter_name):
                seen, own = with_adapter(key, adapter_name), memory_name(graft, name)
                if seen != own and key.startswith(here) and own.startswith(here):
                    found[seen.removeprefix(here)] = own.removeprefix(here)
        return found

    def _mergeable(self, names: Iterable[str] | None) -> list[str]:
        wanted = list(self.roster.active) if names is None else list(names)
        merged = {graft.adapter for graft in self.merged_grafts}
        again = [name for name in wanted if name in merged]
        if again:
            warnings.warn(
                f"{self.path}: adapters {again} are merged already.",
                MultigraftWarning,
                stacklevel=3,
            )
        return [name for name in wanted if name in self.grafts and name not in merged]

    def _layer(self) -> AdaptedLayer:
        return self  # type: ignore[return-value]

    def _tuner(self) -> Tuner:
        from multigraft.tuner import Tuner

        return Tuner(self.roster.root)


class AtLayer:
    """A model's roster as if one layer were all of it, so that what is merged is merged there."""

    def __init__(self, layer: AdaptedLayer) -> None:
        self.__dict__["_layer"] = layer

    @property
    def merged(self) -> list[str]:
        """Adapters that are merged at the layer."""
        return list(self._layer.merged_adapters)

    def touched(self, names: Iterable[str]) -> list[AdaptedLayer]:
        """The layer."""
        return [self._layer]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer.roster, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._layer.roster, name, value)


def delete_for_peft(tuner: Any, adapter_name: str) -> None:
    """Delete an adapter for a caller who takes its config out of ``model.peft_config`` himself.

    With the last adapter, what the model shows of having any is left to him to take off.
    """
    shown: dict[str, Any] = tuner.model.__dict__
    before = {name: shown[name] for name in ("peft_config", FLAG) if name in shown}
    tuner.delete_adapter(adapter_name)
    for name, value in before.items():
        shown.setdefault(name, value)
