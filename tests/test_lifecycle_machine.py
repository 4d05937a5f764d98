"""Random sequences of lifecycle operations against a dense statement of what must come out.

After every step: structure, outputs, gradients, flags, state dicts, the base's bits, the status.
An operation that must fail is run, must raise, and must change nothing.

MULTIGRAFT_MACHINE=500 (or another number) runs that many random sequences instead of the fixed few.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from multigraft import (
    AdapterNameError,
    CheckpointError,
    LoraConfig,
    MultigraftWarning,
    RoutingError,
    StateError,
    TargetError,
    get_peft_model,
    inject_adapter_in_model,
)
from tests.checked_model import CheckedModel
from tests.dense_truth import KINDS, Record, run, together
from tests.laws import fingerprint

MANY = int(os.environ.get("MULTIGRAFT_MACHINE", "0"))
NAMES = st.sampled_from(["default", "v1.0", "keys", "lora_A"])
KIND = st.sampled_from(sorted(KINDS))
SOME = st.lists(st.integers(0, 3), min_size=1, max_size=3)
BAD = [
    {"target_modules": ["up", "lora_A"]},
    {"target_modules": ["base_layer"]},
    {"target_modules": ["up", "norm"]},
    {"target_modules": r".*lora_B.*"},
    {"target_modules": ["head"], "modules_to_save": ["haed"]},
    {"target_modules": ["head"], "rank_pattern": {"up": 2}},
]


class Lifecycle(CheckedModel):
    """Each rule does one operation to the model and to the truth."""

    # -- adding -------------------------------------------------------------------------------

    @initialize(name=NAMES, kind=KIND)
    def first(self, name: str, kind: str) -> None:
        self.handles.append(get_peft_model(self.base, LoraConfig(**KINDS[kind].options), name))
        self.active = [name]
        self.record(name, kind, trains=True)
        self.perturb(name)

    @rule(name=NAMES, kind=KIND, trained=st.booleans())
    def add(self, name: str, kind: str, trained: bool) -> None:
        config = LoraConfig(**KINDS[kind].options)
        if name in self.truth:
            self.refused(AdapterNameError, lambda: self.model.add_adapter(name, config))
            return
        is_first = not self.truth
        self.model.add_adapter(name, config)
        if is_first:
            self.active = [name]
        self.record(name, kind, trains=is_first)
        if trained:
            self.perturb(name)

    @rule(name=NAMES, kind=KIND, how=st.sampled_from(["base", "handle", "inject"]))
    def adapt_again(self, name: str, kind: str, how: str) -> None:
        config = LoraConfig(**KINDS[kind].options)

        def adapt() -> None:
            if how == "inject":
                inject_adapter_in_model(config, self.base, name)
            else:
                held = self.base if how == "base" else self.model
                self.handles.append(get_peft_model(held, config, name))

        if name in self.truth:
            self.refused(AdapterNameError, adapt)
        elif self.clash([*self.merged, name], {name: KINDS[kind]}):
            self.refused(StateError, adapt)
        else:
            adapt()
            self.active = [name]
            self.record(name, kind, trains=True)
            self.perturb(name)

    @rule(options=st.sampled_from(BAD), name=st.sampled_from(["new", "a/b", "..", ""]))
    def add_in_vain(self, options: dict[str, Any], name: str) -> None:
        config = LoraConfig(**options)
        error = TargetError if name == "new" else AdapterNameError
        self.refused(error, lambda: self.model.add_adapter(name, config))
        self.refused(error, lambda: get_peft_model(self.base, config, name))

    # -- choosing -----------------------------------------------------------------------------

    @precondition(lambda self: self.truth)
    @rule(picks=SOME, inference=st.booleans())
    def set_adapter(self, picks: list[int], inference: bool) -> None:
        names = self.names(picks)
        leaving = [n for n in self.merged if n not in names]
        if self.clash(names) or (leaving and self.disabled):
            self.refused(StateError, lambda: self.model.set_adapter(names, inference))
            return
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.model.set_adapter(names if len(names) > 1 else names[0], inference)
        assert bool(leaving) == any("unmerged" in str(w.message) for w in caught)
        self.merged = {n: c for n, c in self.merged.items() if n in names}
        self.active = names
        for name, record in self.truth.items():
            record.trains = name in names and not inference

    @precondition(lambda self: self.truth)
    @rule(picks=SOME, trains=st.booleans())
    def set_requires_grad(self, picks: list[int], trains: bool) -> None:
        names = self.names(picks)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MultigraftWarning)  # merged ones get no gradient
            self.model.base_model.set_requires_grad(names, trains)
        for name in names:
            self.truth[name].trains = trains

    @rule(known=st.booleans())
    def name_a_stranger(self, known: bool) -> None:
        names = ["stranger", *(self.truth if known else ())][::-1]
        for operation in (
            lambda: self.model.set_adapter(names),
            lambda: self.model.delete_adapter("stranger"),
            lambda: self.model.merge_adapter(names),
            lambda: self.model.unmerge_adapter(names),
            lambda: self.model.save_pretrained("nowhere", selected_adapters=names),
            lambda: self.model(self.ids, adapter_names=["stranger"] * len(self.ids)),
        ):
            self.refused((AdapterNameError, StateError, RoutingError), operation)

    @precondition(lambda self: len(self.disabled) < 3)
    @rule()
    def enter_disable(self) -> None:
        context = self.model.disable_adapter()
        context.__enter__()
        self.disabled.append(context)

    @precondition(lambda self: self.disabled)
    @rule()
    def leave_disable(self) -> None:
        self.disabled.pop().__exit__(None, None, None)

    @rule(mode=st.booleans())
    def train(self, mode: bool) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MultigraftWarning)  # merged ones cannot be trained
            self.model.train(mode)

    # -- merging ------------------------------------------------------------------------------

    @precondition(lambda self: self.truth)
    @rule(picks=st.none() | SOME, safe=st.booleans())
    def merge(self, picks: list[int] | None, safe: bool) -> None:
        given = None if picks is None else self.names(picks)
        names = [n for n in self.active if n not in self.merged] if given is None else given
        operation = lambda: self.model.merge_adapter(adapter_names=given, safe_merge=safe)  # noqa: E731
        impossible = self.clash([*self.active, *self.merged, *names])
        if names and (self.disabled or impossible or any(n in self.merged for n in names)):
            self.refused(StateError, operation)
            return
        with warnings.catch_warnings():
            warnings.simplefilter("error" if names else "ignore")
            operation()
        self.merged |= {n: self.change(n).detached() for n in names}

    @precondition(lambda self: self.truth)
    @rule(picks=st.none() | SOME)
    def unmerge(self, picks: list[int] | None) -> None:
        given = None if picks is None else self.names(picks)
        names = list(self.merged) if given is None else given
        if (self.merged and self.disabled) or any(n not in self.merged for n in names):
            self.refused(StateError, lambda: self.model.unmerge_adapter(given))
            return
        with warnings.catch_warnings():
            warnings.simplefilter("error" if names else "ignore")
            self.model.unmerge_adapter(given)
        for name in names:
            del self.merged[name]

    @precondition(lambda self: self.truth)
    @rule(pick=st.integers(0, 3), which=st.integers(0, 20), value=st.sampled_from(["nan", "inf"]))
    def merge_and_load_poison(self, pick: int, which: int, value: str) -> None:
        (name,) = self.names([pick])
        live = self.live(name)
        key = sorted(live)[which % len(live)]
        with torch.no_grad():
            live[key].view(-1)[0] = float(value)
        self.refused(
            (StateError, ValueError), lambda: self.model.merge_adapter(adapter_names=[name])
        )
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder, selected_adapters=[name])
            where = Path(folder) / ("" if name == "default" else name)
            for over in ("new", *self.truth):
                self.refused(
                    (StateError, CheckpointError), lambda o=over: self.model.load_adapter(where, o)
                )
        with torch.no_grad():
            live[key].copy_(self.truth[name].tensors[key])

    # -- values -------------------------------------------------------------------------------

    @precondition(lambda self: self.truth)
    @rule(pick=st.integers(0, 3))
    def step_of_training(self, pick: int) -> None:
        self.perturb(*self.names([pick]))

    @precondition(lambda self: self.truth)
    @rule(pick=st.integers(0, 3), where=st.integers(0, 3), by=st.sampled_from([0.5, -2.0, 0.0]))
    def set_scaling(self, pick: int, where: int, by: float) -> None:
        (name,) = self.names([pick])
        record = self.truth[name]
        path = record.kind.lora[where % len(record.kind.lora)]
        layer: Any = self.base.get_submodule(path)
        if name in self.merged:
            self.refused(StateError, lambda: layer.set_scale(name, by))
            self.refused(StateError, lambda: layer.scaling.update({name: by}))
            return
        layer.set_scale(name, by)
        record.scaling[path] = by * record.kind.scaling
        assert layer.scaling[name] == record.scaling[path]

    # -- files --------------------------------------------------------------------------------

    @precondition(lambda self: self.truth)
    @rule(pick=st.integers(0, 3), onto=NAMES, is_trainable=st.booleans())
    def save_and_load(self, pick: int, onto: str, is_trainable: bool) -> None:
        (source,) = self.names([pick])
        kind = self.truth[source].kind
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder, selected_adapters=[source])
            where = Path(folder) / ("" if source == "default" else source)
            load = lambda: self.model.load_adapter(where, onto, is_trainable)  # noqa: E731
            beside = {*self.active, *self.merged}
            clashes = onto in self.active and self.clash(beside, {onto: kind})
            if onto in self.merged or clashes:
                self.refused(StateError, load)
                return
            report = load()
        assert not (report.missing_keys or report.unexpected_keys or report.mismatched_keys)
        trains = self.truth[onto].trains if onto in self.truth else False
        tensors = {key: t.clone() for key, t in self.truth[source].tensors.items()}
        self.truth[onto] = Record(kind, tensors, dict.fromkeys(kind.lora, kind.scaling), trains)

    # -- leaving ------------------------------------------------------------------------------

    @precondition(lambda self: self.truth)
    @rule(pick=st.integers(0, 3))
    def delete(self, pick: int) -> None:
        (name,) = self.names([pick])
        if name in self.merged and self.disabled:
            self.refused(StateError, lambda: self.model.delete_adapter(name))
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MultigraftWarning)
            self.model.delete_adapter(name)
        del self.truth[name]
        self.merged.pop(name, None)
        if self.active == [name]:
            heirs = [n for n in self.truth if not self.clash([n, *self.merged])]
            self.active = heirs[:1]
        else:
            self.active = [n for n in self.active if n != name]

    @rule(bake=st.booleans())
    def unload(self, bake: bool) -> None:
        operation = self.model.merge_and_unload if bake else self.model.unload
        clash = bake and self.clash([*self.active, *self.merged])
        pending = bake and any(n not in self.merged for n in self.active)
        if clash or (self.disabled and (self.merged or pending)):
            self.refused(StateError, operation)
            return
        changes = list(self.merged.values())
        changes += [self.change(n) for n in self.active if n not in self.merged]
        assert operation() is self.base
        self.truth, self.active, self.merged = {}, [], {}
        mode = self.base.training
        self.base.train(True)
        if bake:
            expected = together(self.values, changes)
            for key, tensor in self.own.items():
                torch.testing.assert_close(tensor.detach(), expected[key])
            assert fingerprint(self.base).modules == self.before.modules
            self._remember_base()
        assert fingerprint(self.base) == self.before
        self.base.train(mode)

    # -- rows ---------------------------------------------------------------------------------

    @rule(rows=st.lists(st.integers(-1, 3), min_size=4, max_size=4))
    def mixed_batch(self, rows: list[int]) -> None:
        if not self.truth:
            rows = [-1] * 4
        names = ["__base__" if i < 0 else self.names([i])[0] for i in rows]
        if self.merged or self.disabled:
            self.refused(RoutingError, lambda: self.model(self.ids, adapter_names=names))
            return
        y = self.model(self.ids, adapter_names=names)
        for row, name in enumerate(names):
            changes = [] if name == "__base__" else [self.change(name)]
            expected = run(together(self.values, changes), self.ids[row : row + 1])
            torch.testing.assert_close(y[row : row + 1].detach(), expected)


Lifecycle.TestCase.settings = settings(
    derandomize=not MANY,
    deadline=None,
    database=None,
    max_examples=MANY or 40,
    stateful_step_count=40 if MANY else 25,
    suppress_health_check=list(HealthCheck),
)
TestLifecycle = Lifecycle.TestCase
