"""A live model beside the dense statement of what it must be, and all that compares the two."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition

from multigraft import MultigraftWarning, PeftModel, get_model_status, get_peft_model_state_dict
from tests.dense_truth import KINDS, Change, Net, Record, Tensors, run, together
from tests.laws import adapted_paths, assert_side_by_side, bits_of, fingerprint

PREFIX = "base_model.model."


class CheckedModel(RuleBasedStateMachine):
    """A model and its truth; every invariant compares the two, after every step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = Net().double()
        self.base.emb.weight.requires_grad_(False)
        self.pristine = copy.deepcopy(self.base)
        self.own = dict(self.base.named_parameters())
        self.original_flags = {k: p.requires_grad for k, p in self.own.items()}
        self.ids = torch.tensor([[0, 1, 2], [3, 4, 5], [6, 5, 0], [2, 2, 4]])
        self.handles: list[PeftModel] = []
        self.steps = 0
        self.truth: dict[str, Record] = {}
        self.active: list[str] = []
        self.merged: dict[str, Change] = {}
        self.disabled: list[Any] = []
        self._remember_base()

    def _remember_base(self) -> None:
        self.values: Tensors = {k: p.detach().clone() for k, p in self.own.items()}
        self.before = fingerprint(self.base)

    def teardown(self) -> None:
        while self.disabled:
            self.disabled.pop().__exit__(None, None, None)
        if self.handles:
            self.handles[0].unload()
            self.handles[0].train(True)
            assert fingerprint(self.base) == self.before

    # -- the truth ----------------------------------------------------------------------------

    @property
    def model(self) -> PeftModel:
        """Any of the handles: they are the same."""
        return self.handles[self.steps % len(self.handles)]

    def names(self, picks: Iterable[int]) -> list[str]:
        """Existing adapters by number, without repeats."""
        known = list(self.truth)
        return list(dict.fromkeys(known[i % len(known)] for i in picks))

    def change(self, name: str) -> Change:
        return self.truth[name].change(self.values)

    def clash(self, names: Iterable[str], kinds: dict[str, Any] | None = None) -> bool:
        """Whether two of these adapters would each replace the same module."""
        kinds = {n: self.truth[n].kind for n in self.truth} | (kinds or {})
        saved = [path for n in dict.fromkeys(names) for path in kinds[n].saved]
        return len(saved) != len(set(saved))

    def live(self, name: str) -> Tensors:
        """The adapter's own tensors, as the library hands them out."""
        state = get_peft_model_state_dict(self.model, adapter_name=name)
        return {key.removeprefix(PREFIX): tensor for key, tensor in state.items()}

    def refused(self, error: Any, operation: Callable[[], object]) -> None:
        """The operation must raise, and leave every object, bit and flag as it was."""
        before = fingerprint(self.base)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", MultigraftWarning)
                operation()
        except error:
            assert fingerprint(self.base) == before
            return
        raise AssertionError(f"{error} was not raised")

    def record(self, name: str, kind: str, trains: bool) -> None:
        """Take over a new adapter's random values, after checking what must be true of them."""
        k = KINDS[kind]
        self.truth[name] = Record(k, {}, dict.fromkeys(k.lora, k.scaling), trains)
        tensors = {key: t.detach().clone() for key, t in self.live(name).items()}
        assert set(tensors) == k.keys()
        self.truth[name].tensors = tensors
        if k.options.get("init_lora_weights") is not False:
            change = self.change(name)
            for key, value in together(self.values, [change]).items():
                assert torch.equal(value, self.values[key]), f"{name} changes {key} from the start"

    def perturb(self, name: str) -> None:
        """Change an adapter's tensors in place, as an optimiser does."""
        for key, tensor in self.live(name).items():
            with torch.no_grad():
                tensor.add_(torch.randn_like(tensor), alpha=0.3)
            self.truth[name].tensors[key] = tensor.detach().clone()

    # -- what must be true after every step ----------------------------------------------------

    @precondition(lambda self: self.handles)
    @invariant()
    def structure_is_flat(self) -> None:
        self.steps += 1
        assert_side_by_side(self.base, self.pristine)
        paths = {p for r in self.truth.values() for p in r.kind.paths}
        paths |= {"alias"} if "twin" in paths else set()
        assert adapted_paths(self.base) == sorted(paths)

    @precondition(lambda self: self.handles)
    @invariant()
    def state_dicts_and_flags_are_each_adapters_own(self) -> None:
        theirs = set()
        for name, record in self.truth.items():
            live = self.live(name)
            assert set(live) == record.kind.keys()
            for key, tensor in live.items():
                assert torch.equal(tensor, record.tensors[key]), f"{name}: {key}"
                assert tensor.requires_grad == record.trains, f"{name}: {key}"
                assert id(tensor) not in theirs
                theirs.add(id(tensor))
        for key, parameter in self.own.items():
            expected = self.original_flags[key] and not self.truth
            assert parameter.requires_grad == expected, key
        everything = {id(p) for p in self.base.parameters()}
        assert everything == theirs | {id(p) for p in self.own.values()}

    @precondition(lambda self: self.handles)
    @invariant()
    def base_holds_its_own_bits_and_what_is_merged(self) -> None:
        merged = {} if self.disabled else self.merged
        expected = together(self.values, merged.values())
        for key, tensor in self.own.items():
            if any(key in {*c.replaced, *c.added} for c in merged.values()):
                torch.testing.assert_close(tensor.detach(), expected[key])
            else:
                assert bits_of(tensor) == bits_of(self.values[key]), key

    @precondition(lambda self: self.handles)
    @invariant()
    def outputs_and_gradients_are_the_dense_ones(self) -> None:
        acting = [] if self.disabled else [n for n in self.active if n not in self.merged]
        leaves = {
            name: {
                key: tensor.clone().requires_grad_(self.truth[name].trains)
                for key, tensor in self.truth[name].tensors.items()
            }
            for name in acting
        }
        changes = [] if self.disabled else list(self.merged.values())
        changes += [self.truth[n].change(self.values, t) for n, t in leaves.items()]
        base = self.values
        if not self.truth:
            base = {k: v.clone().requires_grad_(self.original_flags[k]) for k, v in base.items()}
            leaves = {"": base}
        expected = run(together(base, changes), self.ids)
        y = self.model(self.ids)
        torch.testing.assert_close(y.detach(), expected.detach())
        assert y.requires_grad == expected.requires_grad
        if y.requires_grad:
            weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
            (y * weight).sum().backward()
            (expected * weight).sum().backward()
        self._compare_gradients(leaves)

    def _compare_gradients(self, leaves: dict[str, Tensors]) -> None:
        """Each acting adapter's gradients are the dense ones, and nothing else has any."""
        seen = set()
        for name, tensors in leaves.items():
            live = self.live(name) if name else self.own
            for key, leaf in tensors.items():
                seen.add(id(live[key]))
                assert (live[key].grad is None) == (leaf.grad is None), f"{name}: {key}"
                if leaf.grad is not None:
                    torch.testing.assert_close(live[key].grad, leaf.grad)
        for path, parameter in self.base.named_parameters():
            assert parameter.grad is None or id(parameter) in seen, path
            parameter.grad = None

    @precondition(lambda self: self.handles)
    @invariant()
    def status_tells_the_truth(self) -> None:
        for handle in (self.model, self.handles[0]):
            assert handle.active_adapters == self.active
            assert list(handle.peft_config) == list(self.truth)
        status = get_model_status(self.model)
        assert status.available_adapters == sorted(self.truth)
        assert status.active_adapters == self.active
        assert status.merged_adapters == [n for n in self.truth if n in self.merged]
        assert status.requires_grad == {n: r.trains for n, r in self.truth.items()}
        assert status.enabled == (not self.disabled) or not self.truth
        paths = {p for r in self.truth.values() for p in r.kind.paths}
        assert status.num_adapter_layers == len(paths)
