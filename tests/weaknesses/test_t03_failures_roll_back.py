"""T3: an operation that fails, early or half-way, leaves everything as it was.

PEFT 0.21.2: `add_adapter("b", LoraConfig(target_modules=["lin0", "act"]))` raises on `act` and
leaves "b" on lin0; the retry with `["lin1"]` trains and saves both.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from multigraft import (
    AdaptedLayer,
    LoraConfig,
    PeftModel,
    StateError,
    TargetError,
    get_peft_model,
    inject_adapter_in_model,
)
from multigraft.methods.lora import LoRA
from multigraft.methods.saved_module import SavedModule
from multigraft.roster import Roster
from multigraft.storage.dense import Dense
from tests.weaknesses import nets

CONFIG = LoraConfig(r=2, target_modules=["up", "down", "conv", "embed"], modules_to_save=["head"])
OTHER = LoraConfig(r=3, target_modules=["up", "head", "conv"], bias="all")


class Injected(Exception):
    """The failure that a test plants."""


def fail_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """Let the ``call``-th call of ``owner.name`` raise; earlier and later ones run."""
    original: Callable[..., Any] = getattr(owner, name)
    count = 0

    def planted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            raise Injected(f"{name}, call {call}")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, planted)


def adapted() -> PeftModel:
    model = get_peft_model(nets.net(), OTHER, adapter_name="other")
    nets.train_by_hand(model, "other")
    return model


STEPS = [
    (LoRA, "tensors", 3),
    (LoRA, "reset", 1),
    (LoRA, "reset", 4),
    (SavedModule, "module", 1),
    (AdaptedLayer, "__init__", 1),
    (AdaptedLayer, "add", 1),
    (AdaptedLayer, "add", 3),
    (AdaptedLayer, "add_stand_in", 1),
]
steps = pytest.mark.parametrize(
    ("owner", "name", "call"), STEPS, ids=[f"{o.__name__}.{n}-{c}" for o, n, c in STEPS]
)


@steps
def test_t03_get_peft_model_that_fails_half_way_leaves_the_plain_model(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int
) -> None:
    model = nets.net()
    model.head.weight.requires_grad_(False)
    before = nets.known(model)
    with monkeypatch.context() as patch:
        fail_at(patch, owner, name, call)
        with pytest.raises(Injected):
            get_peft_model(model, CONFIG)
    nets.assert_as_before(model, before)


@steps
def test_t03_add_adapter_that_fails_half_way_leaves_the_other_adapter(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int
) -> None:
    model = adapted()
    before, output = nets.known(model), model(nets.ids())
    with monkeypatch.context() as patch:
        fail_at(patch, owner, name, call)
        with pytest.raises(Injected):
            model.add_adapter("b", CONFIG)
    nets.assert_as_before(model, before)
    assert nets.same_bits(model(nets.ids()), output)


@steps
def test_t03_add_adapter_that_fails_beside_a_merged_one_leaves_it_merged(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int
) -> None:
    bits = nets.base_bits(nets.net())
    model = adapted()
    model.merge_adapter()
    before = nets.known(model)
    with monkeypatch.context() as patch:
        fail_at(patch, owner, name, call)
        with pytest.raises(Injected):
            model.add_adapter("b", CONFIG)
    nets.assert_as_before(model, before)
    nets.assert_bits(model.unload(), bits)


@pytest.mark.parametrize("call", [1, 2])
def test_t03_a_new_adapter_that_cannot_be_activated_is_taken_out_again(
    monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    model = adapted()
    before = nets.known(model)
    fail_at(monkeypatch, AdaptedLayer, "plan_for", call)
    with pytest.raises(Injected):
        get_peft_model(model, CONFIG, adapter_name="b")
    nets.assert_as_before(model, before)


def test_t03_inject_that_cannot_activate_the_first_adapter_leaves_the_plain_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nets.net()
    before = nets.known(model)
    fail_at(monkeypatch, Roster, "set_active", 1)
    with pytest.raises(Injected):
        inject_adapter_in_model(CONFIG, model)
    nets.assert_as_before(model, before)


@pytest.mark.parametrize("call", [1, 2, 5])
def test_t03_set_adapter_that_fails_half_way_changes_no_plan(
    monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    model = adapted()
    model.add_adapter("b", CONFIG)
    before, output = nets.known(model), model(nets.ids())
    with monkeypatch.context() as patch:
        fail_at(patch, AdaptedLayer, "plan_for", call)
        with pytest.raises(Injected):
            model.set_adapter("b")
    nets.assert_as_before(model, before)
    assert nets.same_bits(model(nets.ids()), output)


def test_t03_set_adapter_that_is_refused_unmerges_nothing() -> None:
    model = get_peft_model(nets.net(), CONFIG, adapter_name="a")
    model.add_adapter("b", CONFIG)
    model.add_adapter("c", OTHER)
    nets.train_by_hand(model, "a", "b", "c")
    model.set_adapter("c")
    model.merge_adapter()
    before = nets.known(model)
    with pytest.raises(StateError, match="each hold a trained copy"):
        model.set_adapter(["a", "b"])
    nets.assert_as_before(model, before)


@pytest.mark.parametrize("name", ["keep", "in_place", "write"])
@pytest.mark.parametrize("call", [1, 2, 6])
@pytest.mark.parametrize("adapters", [["other"], ["b"], ["other", "b"]])
def test_t03_merge_that_fails_half_way_restores_every_bit(
    monkeypatch: pytest.MonkeyPatch, name: str, call: int, adapters: list[str]
) -> None:
    model = adapted()
    model.add_adapter("b", CONFIG)
    nets.train_by_hand(model, "b")
    model.set_adapter(["other", "b"])
    before, output = nets.known(model), model(nets.ids())
    with monkeypatch.context() as patch:
        if name == "write":  # of whole tensors; otherwise linear ones are written in place
            patch.setattr(Dense, "in_place", lambda *_: None)
        fail_at(patch, Dense, name, call)
        with pytest.raises(Injected):
            model.merge_adapter(adapters)
    nets.assert_as_before(model, before)
    assert nets.same_bits(model(nets.ids()), output)


@pytest.mark.parametrize("call", [1, 4])
def test_t03_a_second_merge_that_fails_leaves_the_first_one_exact(
    monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    bits = nets.base_bits(nets.net())
    model = adapted()
    model.add_adapter("b", CONFIG)
    nets.train_by_hand(model, "b")
    model.set_adapter(["other", "b"])
    model.merge_adapter(["other"])
    before = nets.known(model)
    with monkeypatch.context() as patch:
        fail_at(patch, Dense, "in_place", call)
        with pytest.raises(Injected):
            model.merge_adapter(["b"])
    nets.assert_as_before(model, before)
    nets.assert_bits(model.unload(), bits)


def test_t03_merge_and_unload_that_fails_keeps_the_adapters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = adapted()
    model.add_adapter("b", CONFIG)
    before = nets.known(model)
    with monkeypatch.context() as patch:
        fail_at(patch, Dense, "write", 3)
        with pytest.raises(Injected):
            model.merge_and_unload(adapter_names=["b"])
    nets.assert_as_before(model, before)


@pytest.mark.parametrize("where", ["LoRA.tensors", "AdaptedLayer.add", "set_active"])
def test_t03_load_of_a_new_adapter_that_fails_half_way_adds_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str
) -> None:
    trained = get_peft_model(nets.net(), CONFIG, adapter_name="b")
    nets.train_by_hand(trained, "b")
    trained.save_pretrained(tmp_path)
    model = adapted()
    before = nets.known(model)
    with monkeypatch.context() as patch:
        if where == "set_active":
            fail_at(patch, Roster, "set_active", 1)
        else:
            owner = LoRA if where == "LoRA.tensors" else AdaptedLayer
            fail_at(patch, owner, where.partition(".")[2], 4)
        with pytest.raises(Injected):
            model.load_adapter(tmp_path / "b", "b", activate=True)
    nets.assert_as_before(model, before)


@pytest.mark.parametrize("call", [1, 2, 6])
def test_t03_loading_over_an_adapter_that_fails_half_way_leaves_its_values(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: int
) -> None:
    trained = get_peft_model(nets.net(), CONFIG, adapter_name="b")
    nets.train_by_hand(trained, "b", seed=1)
    trained.save_pretrained(tmp_path)
    model = adapted()
    model.add_adapter("b", CONFIG)
    nets.train_by_hand(model, "b", seed=2)
    before = nets.known(model)
    with monkeypatch.context() as patch:
        fail_at(patch, torch.Tensor, "copy_", call)
        with pytest.raises(Injected):
            model.load_adapter(tmp_path / "b", "b")
    nets.assert_as_before(model, before)


@pytest.mark.parametrize(
    ("name", "call"), [("add", 1), ("add", 2), ("plan_for", 1), ("plan_for", 4)]
)
def test_t03_loading_over_with_another_rank_that_fails_puts_the_old_one_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, call: int
) -> None:
    trained = get_peft_model(nets.net(), LoraConfig(r=4, target_modules=["up"]), adapter_name="b")
    trained.save_pretrained(tmp_path)
    model = adapted()
    model.add_adapter("b", LoraConfig(r=2, target_modules=["up", "head", "conv"]))
    nets.train_by_hand(model, "b")
    model.set_adapter(["other", "b"])
    before, output = nets.known(model), model(nets.ids())
    with monkeypatch.context() as patch:
        fail_at(patch, AdaptedLayer, name, call)
        with pytest.raises(Injected):
            model.load_adapter(tmp_path / "b", "b")
    nets.assert_as_before(model, before)
    assert nets.same_bits(model(nets.ids()), output)


@pytest.mark.parametrize(
    "targets", [["up", "act"], ["norm", "up"], ["up", "upp"], "blocks", ["head", "blocks.7.up"]]
)
def test_t03_a_config_that_does_not_fit_adds_nothing_and_the_retry_is_exact(
    targets: list[str] | str,
) -> None:
    model = nets.net()
    model.act = nn.ReLU()
    before = nets.known(model)
    with pytest.raises(TargetError):
        get_peft_model(model, LoraConfig(target_modules=targets))
    nets.assert_as_before(model, before)
    retried = get_peft_model(model, LoraConfig(target_modules=["down"]))
    assert nets.trainable(retried) == {
        f"blocks.{i}.down.lora_{x}.default.weight" for i in (0, 1) for x in "AB"
    }
    paths = [x.path for x in retried.roster.layers["default"]]
    assert paths == ["blocks.0.down", "blocks.1.down"]
