"""The laws of the contracts, each a function of a `Pair`; the suite runs every one on every pair.

    for law in LAWS:
        if law.applies(pair):
            law(pair)

What a method may leave out is what its traits say; no law knows a method, geometry or storage by
name. Exact laws run in float64 where the storage is plain, and within its own rounding elsewhere.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import multigraft
from multigraft import MultigraftError, PeftModel
from multigraft.config import CONFIGS
from multigraft.methods import METHODS
from multigraft.storage import storage_of
from tests.contracts.at_work import (
    REFUSALS,
    assert_near,
    attach,
    base_bits,
    batch,
    begins_still,
    exact,
    fill,
    grafts,
    has_exact_gradients,
    is_plain,
    mergeable,
    replaces,
    tolerance,
    tried,
)
from tests.contracts.pairs import ONLY_DENSE, ROWS, STORAGES, TARGET, Pair, Subject
from tests.laws import fingerprint


@dataclass(frozen=True)
class Law:
    """One law, and whether it says anything about a pair that is supported."""

    check: Callable[[Pair], None]
    applies: Callable[[Pair], bool]
    gradients: bool

    def __call__(self, pair: Pair) -> None:
        with torch.set_grad_enabled(self.gradients):
            self.check(pair)

    def __str__(self) -> str:
        return self.check.__name__


LAWS: list[Law] = []


def law(
    applies: Callable[[Pair], bool] = lambda pair: True, gradients: bool = False
) -> Callable[..., None]:
    """Decorator: put a law on the list."""

    def add(check: Callable[[Pair], None]) -> None:
        LAWS.append(Law(check, applies, gradients))

    return add


# -- the laws -------------------------------------------------------------------------------------


@law(begins_still)
def a_new_adapter_changes_nothing(pair: Pair) -> None:
    subject, x = exact(pair, pair.subject()), batch(pair)
    before = subject(x)
    model = multigraft.get_peft_model(subject, CONFIGS[pair.peft_type](**pair.kwargs())).eval()
    assert_near(model(x), before, tolerance(pair))


@law()
def a_filled_adapter_changes_the_output_and_disabling_gives_the_bases(pair: Pair) -> None:
    subject, x = exact(pair, pair.subject()), batch(pair)
    before = subject(x)
    model = attach(pair, subject=subject)
    assert not torch.equal(model(x), before)
    with model.disable_adapter():
        assert torch.equal(model(x), before)


@law(is_plain)
def what_it_adds_is_the_layer_run_with_its_delta(pair: Pair) -> None:
    subject, x = exact(pair, pair.subject()), batch(pair)
    layer, base, x = subject.target, subject(x), subject.seen(x)
    model = attach(pair, subject=subject)
    for graft in grafts(model, pair):
        method, params = graft.method, graft.params
        if method.kind != "additive" or graft.site.rebinds:
            continue
        W = graft.site.weight()
        delta = method.delta(params, W if method.needs_weight else None)
        assert delta.shape == W.shape
        run = method.geometry.run
        expected = run(layer, x, W + delta) - run(layer, x, W)
        if (bias := method.delta_bias(params)) is not None:
            expected = expected + method.as_output_bias(bias)
        found = graft.add(base.clone(), x, False, base) - base
        assert_near(found, expected, tolerance(pair))


@law(mergeable)
def merged_is_the_forward(pair: Pair) -> None:
    model, x = attach(pair), batch(pair)
    expected = model(x)
    model.merge_adapter()
    assert_near(model(x), expected, tolerance(pair) + 2 * STORAGES[pair.storage].error)
    assert_near(
        model.merge_and_unload()(x), expected, tolerance(pair) + 2 * STORAGES[pair.storage].error
    )


@law(lambda pair: mergeable(pair) and pair.storage not in ONLY_DENSE and not replaces(pair))
def merging_rounds_once_what_the_plain_twin_holds(pair: Pair) -> None:
    model = attach(pair)
    (graft, *_) = grafts(model, pair)
    site = graft.site
    weight = storage_of(site.layer).read(site.layer)
    plain = torch.nn.Linear(*weight.T.shape)
    plain.weight.copy_(weight)
    plain.bias.copy_(site.layer.bias)
    twin = attach(pair, subject=Subject(plain).double().requires_grad_(False).eval())
    state = multigraft.get_peft_model_state_dict(model, adapter_name="a")
    wide = {key: value.double() for key, value in state.items()}
    multigraft.set_peft_model_state_dict(twin, wide, "a")
    model.merge_adapter(), twin.merge_adapter()
    error = max(STORAGES[pair.storage].error, 4e-6)
    name = site.tensor_name
    assert_near(site.storage.read(site.layer, name), getattr(plain, name), 1.1 * error)


@law(mergeable)
def unmerging_gives_the_bits_back(pair: Pair) -> None:
    model, x = attach(pair, "a", "b"), batch(pair)
    expected, before = model(x), base_bits(model)
    model.merge_adapter(["a"])
    assert base_bits(model) != before
    fill(model, "a", seed=30)
    model.unmerge_adapter()
    assert base_bits(model) == before
    twin = attach(pair, "a", "b")
    as_it_was = multigraft.get_peft_model_state_dict(twin, adapter_name="a")
    multigraft.set_peft_model_state_dict(model, as_it_was, "a")
    assert torch.equal(model(x), expected)


@law(
    lambda pair: (
        METHODS[pair.method].mergeable and not STORAGES[pair.storage].merges and not replaces(pair)
    )
)
def a_storage_that_cannot_be_written_refuses_the_merge_and_stays(pair: Pair) -> None:
    model = attach(pair)
    model(batch(pair))
    before = fingerprint(model)
    with pytest.raises(MultigraftError, match=TARGET):
        model.merge_adapter()
    assert fingerprint(model) == before


@law()
def two_adapters_stand_in_parallel(pair: Pair) -> None:
    subject, x = exact(pair, pair.subject()), batch(pair)
    layer, base = subject.target, subject(x)
    model = attach(pair, "a", "b", subject=subject)
    (a, *_), (b, *_) = grafts(model, pair, "a"), grafts(model, pair, "b")
    if a.method.kind == "replace":
        before = fingerprint(model)
        with pytest.raises(multigraft.StateError):
            model.base_model.set_adapter(["a", "b"])
        assert fingerprint(model) == before
        return
    if a.site.rebinds:
        their_tensors_combine(model, pair)
        return
    alone = {}
    for name in ("a", "b"):
        model.set_adapter(name)
        alone[name] = model(x)
    model.base_model.set_adapter(["a", "b"])
    if a.method.kind == "map":
        seen = b.method.input(b.params, a.method.input(a.params, x))
        y = layer(seen)
        expected = b.method.output(b.params, a.method.output(a.params, y))
    else:
        expected = alone["a"] + alone["b"] - base
    assert_near(model(x), expected, 2 * tolerance(pair))


def their_tensors_combine(model: PeftModel, pair: Pair) -> None:
    """What another forward reads of two adapters: both changes' sum, or one map after the other."""
    held = model.get_base_model().get_submodule(TARGET)
    for a, b in zip(grafts(model, pair, "a"), grafts(model, pair, "b"), strict=True):
        seen = {}
        for names in (["a"], ["b"], ["a", "b"]):
            model.base_model.set_adapter(names)
            seen["".join(names)] = held.show(a.site.key)
        own = a.site.weight()
        if seen["ab"] is None:  # nobody but the module's own forward reads it
            both = own + sum(g.method.delta(g.params) for g in (a, b))
            expected = torch.func.functional_call(held.base_layer, {a.site.key: both}, batch(pair))
            assert_near(model(batch(pair)), expected, 2 * tolerance(pair))
            continue
        if a.method.kind == "additive":
            assert_near(seen["ab"], seen["a"] + seen["b"] - own, 2 * tolerance(pair))
            continue
        v = torch.eye(own.shape[1], dtype=own.dtype)
        y = b.method.input(b.params, a.method.input(a.params, v)) @ own.T
        expected = b.method.output(b.params, a.method.output(a.params, y))
        assert_near(v @ seen["ab"].T, expected, 2 * tolerance(pair))


@law(lambda pair: mergeable(pair) and not replaces(pair))
def two_merged_are_the_forward_of_both(pair: Pair) -> None:
    model, x = attach(pair, "a", "b"), batch(pair)
    model.base_model.set_adapter(["a", "b"])
    expected = model(x)
    model.merge_adapter()
    assert_near(model(x), expected, 2 * (tolerance(pair) + STORAGES[pair.storage].error))


@law()
def a_mixed_batch_is_row_by_row(pair: Pair) -> None:
    model, x = attach(pair, "a", "b"), batch(pair)
    names = ["a", "b", "__base__", "a"]
    assert len(names) == ROWS
    takes_rows = all(graft.site.takes_rows for graft in grafts(model, pair))
    if not (METHODS[pair.method].batchable and takes_rows):
        with pytest.raises(multigraft.RoutingError):
            model(x, adapter_names=names)
        return
    found = model(x, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                expected = model(x)[row]
        else:
            model.set_adapter(name)
            expected = model(x)[row]
        assert_near(found[row], expected, tolerance(pair))


@law()
def saved_and_loaded_is_the_same(pair: Pair) -> None:
    model, x = attach(pair, "default"), batch(pair)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        fresh = exact(pair, pair.subject())
        again = PeftModel.from_pretrained(
            fresh, folder, autocast_adapter_dtype=not is_plain(pair)
        ).eval()
    first = multigraft.get_peft_model_state_dict(model)
    second = multigraft.get_peft_model_state_dict(again)
    assert list(first) == list(second)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(model(x), again(x))


@law(gradients=True)
def gradients_reach_its_own_parameters_and_no_others(pair: Pair) -> None:
    model, x = attach(pair, "a", "b").train(), batch(pair)
    model.set_adapter("a")
    model(x).float().square().sum().backward()
    here = [g for layer, g in model.roster.grafts("a") if layer.path == TARGET]
    own = {id(p) for graft in here for p in graft.parameters()}
    reached = {id(p) for p in model.parameters() if p.grad is not None}
    assert reached == own
    for parameter in model.parameters():
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all()
            assert parameter.grad.count_nonzero()


@law(lambda pair: is_plain(pair) and has_exact_gradients(pair), gradients=True)
def gradients_are_those_of_finite_differences(pair: Pair) -> None:
    model, x = attach(pair), batch(pair)[:1]
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def forward(*values: Tensor) -> Tensor:
        seen = values[0] if x.is_floating_point() else x
        given = dict(zip(parameters, values[-len(parameters) :], strict=True))
        y = torch.func.functional_call(model, given, (seen,))
        return y.square().sum()

    inputs = [p.detach().clone().requires_grad_() for p in parameters.values()]
    if x.is_floating_point():
        inputs.insert(0, x.clone().requires_grad_())
    assert torch.autograd.gradcheck(forward, inputs, fast_mode=True, atol=1e-5, rtol=1e-4)


@law(lambda pair: pair.storage == "bfloat16")
def half_precision_is_close_to_full(pair: Pair) -> None:
    model, x = attach(pair), batch(pair)
    wide = copy.deepcopy(model).float()
    seen = x.float() if x.is_floating_point() else x
    assert model(x).dtype == torch.bfloat16
    assert_near(model(x), wide(seen), 2e-2)


@law()
def deleting_leaves_no_trace(pair: Pair) -> None:
    subject = exact(pair, pair.subject())
    before = fingerprint(subject)
    model = attach(pair, "a", "b", subject=subject)
    model.delete_adapter("a")
    assert not [n for n, _ in model.named_parameters() if ".a" in n.split(TARGET)[-1]]
    assert model.unload() is subject
    assert fingerprint(subject) == before


# -- where a pair is not supported ----------------------------------------------------------------


def is_supported(pair: Pair) -> bool:
    """Whether the config can be attached, and makes this method act on the layer."""
    return tried(pair).standing == "supported"


def is_refused(pair: Pair) -> bool:
    """Whether attaching it is an error; a layer without a bias, say, has none to train."""
    return tried(pair).standing == "refused"


def refusal_leaves_the_model_untouched(pair: Pair) -> None:
    """An error that names the layer, and a model as it was."""
    subject = exact(pair, pair.subject())
    before = fingerprint(subject)
    with pytest.raises(REFUSALS, match=f"{TARGET}|{pair.method}|target_modules"):
        multigraft.get_peft_model(subject, CONFIGS[pair.peft_type](**pair.kwargs()))
    assert fingerprint(subject) == before
