"""The tuner: the lifecycle of adapters on a model in place, whoever holds the model.

It is what `PeftModel.base_model` is, and what `inject_adapter_in_model` uses: add, activate,
disable, merge, delete. Nothing here knows about files.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from multigraft import merge as merging
from multigraft.combine.facade import Combines
from multigraft.config import PeftConfig
from multigraft.errors import MultigraftWarning, StateError, UnsupportedError
from multigraft.integrations import announce
from multigraft.layer import AdaptedLayer
from multigraft.methods import METHODS
from multigraft.prepare import Prepared, prepare
from multigraft.prompts import CONTEXTS
from multigraft.requantisation import Loss
from multigraft.schedule import StepByStep, penalised
from multigraft.spans import spans_of_forward
from multigraft.storage import let_gradients_through
from multigraft.survey import survey
from multigraft.ties import settle
from multigraft.tuner_facade import TunerFacade, targeted_by
from multigraft.wrap import attach, detach, roster_of, roster_without_layers


class Tuner(StepByStep, Combines, TunerFacade, nn.Module):
    """Adapters on ``model``, in place. Two tuners of one model share its roster.

    Args:
        model: the base model, adapted already or not.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.roster = roster_of(model, survey(model)) or roster_without_layers(model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward, with whatever adapters act."""
        with spans_of_forward(self.roster, args, kwargs):
            return penalised(self.roster, self.model(*args, **kwargs))

    @property
    def prefix(self) -> str:
        """How the names of the first adapter's tensors begin; other packages filter on it."""
        kinds = [str(config.peft_type) for config in self.peft_config.values()]
        return next((METHODS[kind].prefix for kind in kinds if kind in METHODS), "lora_")

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The model's own copies of its adapters' configs, by name."""
        return self.roster.configs

    @property
    def active_adapters(self) -> list[str]:
        """Active adapters, in order."""
        return list(self.roster.active)

    @property
    def active_adapter(self) -> list[str]:
        """The same list, under the name that PEFT's tuners have."""
        return self.active_adapters

    def add_adapter(
        self,
        adapter_name: str,
        config: PeftConfig,
        *,
        given: Mapping[str, Tensor] | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        lenient: bool = False,
        activate: bool | None = None,
    ) -> None:
        """Graft a new adapter beside those that are there; all of it, or nothing.

        Args:
            given: tensors by name on disk (``<path>.lora_A.weight``); what is given is not
                initialised.
            autocast_adapter_dtype: keep float32 adapters on a half-precision base.
            low_cpu_mem_usage: make the tensors on the meta device, to be loaded later.
            lenient: warn about target names that match nothing, rather than fail.
            activate: make it the active adapter; by default only when there is no other.

        Raises:
            AdapterNameError: the name is taken or cannot name a folder.
            TargetError: the config does not fit the model.
        """
        prepared = self.prepare(adapter_name, config, lenient=lenient)
        self.commit(
            prepared,
            given or {},
            autocast_adapter_dtype,
            on_meta=low_cpu_mem_usage,
            activate=activate,
        )

    def prepare(self, adapter_name: str, config: PeftConfig, *, lenient: bool = False) -> Prepared:
        """Everything that can be known and checked before a tensor is made or the model touched.

        Raises:
            AdapterNameError, TargetError: as for `add_adapter`.
        """
        name = self.roster.require_free(adapter_name)
        return prepare(self.model, name, config, lenient=lenient)

    def commit(
        self,
        prepared: Prepared,
        given: Mapping[str, Tensor],
        autocast_adapter_dtype: bool = True,
        *,
        on_meta: bool = False,
        activate: bool | None = None,
    ) -> None:
        """Make the tensors that are not given, and attach; all of it, or nothing."""
        name, config = prepared.adapter, prepared.config
        scions = prepared.grow(given, autocast_adapter_dtype, on_meta)
        context = prepared.grow_context(given, autocast_adapter_dtype, on_meta)
        attach(self.roster, name, config, scions, context, prepared.replication)
        is_first = len(self.roster.configs) == 1
        if activate or (activate is None and is_first):
            try:
                self.roster.set_active([name])
            except BaseException:
                detach(self.roster, name)
                raise
        if config.inference_mode or name not in self.roster.active:
            self.roster.set_requires_grad([name], False)
        announce(self.roster)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make exactly these adapters active and trainable (unless ``inference_mode``).

        The others that were trainable are frozen; merged ones among them are unmerged, with a
        warning. Flags that you set on parameters yourself stay.

        Raises:
            AdapterNameError: there is no such adapter; nothing was changed.
            StateError: two of them cannot act together.
        """
        names = self.roster.require(adapter_name)
        merged = [n for n in self.roster.merged if n not in names]
        self.roster.check_together(names, without=merged)
        if merged and not self.roster.enabled:
            raise StateError(
                f"adapters {merged} are merged and not among {names}, and cannot be unmerged while "
                "adapters are disabled; leave disable_adapter() first."
            )
        if merged:
            warnings.warn(
                f"adapters {merged} were merged and are not among {names}: they are unmerged.",
                MultigraftWarning,
                stacklevel=2,
            )
            merging.unmerge(self.roster, merged)
        self._warn_of_merged([] if inference_mode else names)
        self.roster.set_active(names)
        others = [n for n in self.roster.trainable if n not in names]
        self.roster.set_requires_grad(others, False)
        self.roster.set_requires_grad(names, not inference_mode)

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Freeze or thaw these adapters; others keep their flags."""
        names = self.roster.require(adapter_names)
        self._warn_of_merged(names if requires_grad else [])
        self.roster.set_requires_grad(names, requires_grad)

    def train(self, mode: bool = True) -> Tuner:
        """Switch the model's training mode; warns when a merged adapter would be trained."""
        if mode and self.roster.merged:
            self._warn_of_merged([n for n in self.roster.merged if self.roster.trains(n)])
        if mode and not self.training:
            let_gradients_through(self.model)
        return super().train(mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter, merged or not; the base's bits come back with the last one.

        When the only active adapter goes, the first remaining one that can act becomes active.
        """
        name = self.roster.require_one(adapter_name)
        was_only = self.roster.active == (name,)
        active = self._heirs(name) if was_only else [n for n in self.roster.active if n != name]
        if name in self.roster.merged:
            merging.unmerge(self.roster, [name])
        self.roster.set_active(active)
        detach(self.roster, name)
        announce(self.roster)
        if was_only and active:
            warnings.warn(
                f"`{name}` was the active adapter; `{active[0]}` is active now.",
                MultigraftWarning,
                stacklevel=2,
            )

    def _heirs(self, name: str) -> list[str]:
        """The first adapter besides ``name`` that can act beside what is merged, if any."""
        for heir in self.roster.configs:
            if heir != name:
                try:
                    self.roster.check_together([heir], without=[name])
                except StateError:
                    continue
                return [heir]
        return []

    def enable_adapter_layers(self) -> None:
        """Let the active adapters act again."""
        self._switch(True)

    def disable_adapter_layers(self) -> None:
        """Give the base's own outputs until adapters are enabled; nothing else changes."""
        self._switch(False)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base's own outputs for the length of the block, merged adapters included."""
        before = self.roster.enabled
        self._switch(False)
        try:
            yield
        finally:
            self._switch(before)

    def merge_adapter(
        self,
        adapter_names: Sequence[str] | None = None,
        safe_merge: bool = False,
        keep_original: bool = True,
    ) -> None:
        """Merge the active adapters, or those named; see `multigraft.merge.merge`."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        merging.merge(self.roster, names, safe=safe_merge, keep_original=keep_original)

    def unmerge_adapter(self, adapter_names: Sequence[str] | None = None) -> None:
        """Take merged adapters (all by default) out again, bit for bit."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        merging.unmerge(self.roster, names)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> nn.Module:
        """The base model with the adapters' changes in its own tensors, and no adapter left.

        Adapters that are merged already stay in. All or nothing: a failure leaves the model as
        it was.
        """
        if self.roster.hidden:
            raise StateError("adapters are disabled; leave disable_adapter() before merging.")
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        pending = self.roster.active if names is None else self.roster.require(names)
        pending = [n for n in pending if n not in self.roster.merged]
        if not (pending or self.roster.merged):
            warnings.warn(
                "no adapter is active or named, so none is merged: the base comes back as it was.",
                MultigraftWarning,
                stacklevel=2,
            )
        active = self.roster.active
        # The active ones are about to go: they have no say in what may be merged.
        self.roster.set_active([])
        try:
            if pending:
                merging.merge(self.roster, pending, safe=safe_merge)
        except BaseException:
            self.roster.set_active(active)
            raise
        settle(self.roster.touched(self.roster.configs))
        return self._clear()

    def unload(self) -> nn.Module:
        """The base model as it was before the first adapter: the same objects, the same bits."""
        if self.roster.merged:
            merging.unmerge(self.roster)
        return self._clear()

    @property
    def merge_report(self) -> list[Loss]:
        """How far each quantised tensor is from what merging was to store there, largest first.

        Empty when nothing is merged into quantised weights; it outlives `merge_and_unload`.
        """
        return sorted(self.roster.losses.values(), key=lambda loss: loss.error, reverse=True)

    def layers(self) -> list[AdaptedLayer]:
        """Every adapted layer of the model, each once."""
        return self.roster.touched(self.roster.configs)

    def _switch(self, enabled: bool) -> None:
        if enabled == self.roster.enabled:
            return
        if enabled:
            merging.show(self.roster.hidden)
            self.roster.hidden = []
        else:
            self.roster.hidden = merging.hide(self.roster)
        self.roster.enabled = enabled
        for layer in self.roster.touched(self.roster.active):
            layer.replan()

    def _clear(self) -> nn.Module:
        self.roster.active = ()
        for name in list(self.roster.configs):
            detach(self.roster, name)
        announce(self.roster)
        return self.model

    def _warn_of_merged(self, to_be_trained: Sequence[str]) -> None:
        merged = [n for n in self.roster.merged if n in to_be_trained]
        if merged:
            warnings.warn(
                f"adapters {merged} are merged into the base: they get no gradient, and training "
                "changes nothing. Call unmerge_adapter() first.",
                MultigraftWarning,
                stacklevel=3,
            )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)


def base_of(model: nn.Module) -> nn.Module:
    """The base model behind a handle of ours; anything else is its own base."""
    if not isinstance(model, nn.Module):
        raise UnsupportedError(f"`model` (={type(model).__name__}) must be a torch.nn.Module.")
    while True:
        held = model if isinstance(model, Tuner) else model._modules.get("base_model")
        if not isinstance(held, Tuner):
            return model
        model = held.model


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Graft an adapter onto ``model`` in place, without a `PeftModel` around it.

    Args:
        peft_config: what to graft; it is copied, never changed.
        model: the base model; a handle (`PeftModel`) stands for its base.
        state_dict: an adapter's tensors by name on disk: its sites are adapted, whatever the config
            targets. The values are not loaded; `set_peft_model_state_dict` does that.

    Returns:
        The same ``model``.

    Raises:
        UnsupportedError: the method changes the context rather than weights.
    """
    base, kind = base_of(model), str(getattr(peft_config, "peft_type", None))
    if kind in CONTEXTS:
        raise UnsupportedError(
            f"{kind} changes what the model is given, at a handle around it: there is "
            "nothing to inject. Use get_peft_model()."
        )
    tuner = Tuner(base)
    if not tuner.roster.configs:
        tuner.roster.in_place = True
    tuner.add_adapter(
        adapter_name,
        targeted_by(peft_config, base, state_dict),
        autocast_adapter_dtype=False,
        low_cpu_mem_usage=low_cpu_mem_usage,
        activate=True,
    )
    return model
