"""AdaLoRA against PEFT: formula, files, penalty, and the same pruning step by step."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import peft
import pytest
import torch
from torch import nn

import multigraft
from multigraft import AdaLoraConfig, ConfigError, StateError, get_peft_model
from multigraft.schedule import StepHook, trainer_callback
from tests import oracle
from tests.methods.against_peft import Case, DropsLikePeft, StartsLikePeft, config_at, tensors_at
from tests.oracle import Pair, build, output, quiet

TRAINED = {
    "kind": "AdaLoraConfig",
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "init_r": 4,
    "target_r": 2,
    "tinit": 2,
    "tfinal": 3,
    "deltaT": 2,
    "total_step": 12,
    "orth_reg_weight": 0.3,
    "task_type": "CAUSAL_LM",
}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
RANKS = {"init_r": 4, "target_r": 2, "total_step": 10, "lora_alpha": 6}


class TestAdaLora(DropsLikePeft, StartsLikePeft):
    kind = "AdaLoraConfig"
    only_theirs = ".ranknum."  # thawed by loading a state dict
    cases: ClassVar = {
        "linear": Case("linear", RANKS),
        "no bias": Case("linear wide", RANKS),
        "Conv1D": Case("conv1d_transposed", RANKS),
        "conv2d": Case("conv2d", RANKS),
        "conv2d 1x1": Case("conv2d 1x1", RANKS),
        "alpha below zero": Case("linear", RANKS | {"lora_alpha": -1}),
        "dropout in evaluation": Case("linear", RANKS | {"lora_dropout": 0.5}),
        "random start": Case("linear", RANKS | {"init_lora_weights": False}),
    }
    dropping: ClassVar = {
        "input": Case("linear", RANKS | {"lora_dropout": 0.5}),
        "input of a conv2d": Case("conv2d", RANKS | {"lora_dropout": 0.5}),
    }


def pair(**more: Any) -> Pair:
    """The same tiny language model in both libraries, the adapter's weights the same, not zero."""
    made = oracle.graft_pair(oracle.llama, TRAINED | more)
    made.batch["labels"] = made.batch["input_ids"]
    return made


def run(model: Any, batch: dict[str, torch.Tensor], steps: int, first: int = 1) -> Iterator[float]:
    """Train by hand, as PEFT's loops do; yields each step's loss."""
    parameters = [p for n, p in model.named_parameters() if p.requires_grad and "ranknum" not in n]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    for step in range(first, first + steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        yield float(loss)


def pattern_of(model: Any) -> dict[str, list[bool]]:
    """What a model's config says is left, by names without the adapter's."""
    pattern = model.peft_config["default"].rank_pattern or {}
    return {key.removesuffix(".default"): value for key, value in pattern.items()}


def trained(steps: int = 12, **more: Any) -> Pair:
    """A pair after this many steps of each, which agreed all the way."""
    both = pair(**more)
    runs = [run(model, both.batch, steps) for model in (both.ours, both.theirs)]
    for step, (ours, theirs) in enumerate(zip(*runs, strict=True), start=1):
        assert ours == pytest.approx(theirs, rel=1e-5), f"step {step}"
        assert pattern_of(both.ours) == pattern_of(both.theirs), f"step {step}"
    return both


def test_training_prunes_the_same_ranks_at_the_same_steps() -> None:
    both = trained()
    kept = [sum(mask) for mask in pattern_of(both.ours).values()]
    assert len(kept) == 6 and sum(kept) == 12, "two ranks are left per site in the mean"
    assert len(set(kept)) > 1, "sites differ in what they keep"
    both.assert_equal(atol=1e-5)


def test_nothing_is_pruned_before_its_time() -> None:
    both = trained(steps=3)
    assert pattern_of(both.ours) == {}
    both = trained(steps=4)
    assert pattern_of(both.ours) != {}


def test_masked_ranks_stay_masked_after_the_last_pruning() -> None:
    both = trained()
    for name, parameter in both.ours.named_parameters():
        if "lora_E" in name:
            path = name.removeprefix("base_model.model.").removesuffix(".default")
            mask = torch.tensor(pattern_of(both.ours)[path])
            assert (parameter.flatten()[~mask] == 0).all()
            assert (parameter.flatten()[mask] != 0).all()


def test_the_penalty_is_added_to_the_loss_as_in_peft() -> None:
    both = pair()
    losses = [model(**both.batch).loss for model in (both.ours, both.theirs)]
    torch.testing.assert_close(*losses)
    with both.ours.disable_adapter():
        plain = both.ours(**both.batch).loss
    bare = build(oracle.llama)(**both.batch).loss
    torch.testing.assert_close(plain, bare)
    both.ours.set_requires_grad("default", False)
    frozen = both.ours(**both.batch).loss
    assert losses[0] - frozen > 0.1


def test_pruned_adapters_are_saved_alike_and_loaded_by_each(tmp_path: Path) -> None:
    both = trained()
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    both.ours.save_pretrained(ours)
    with quiet():
        both.theirs.save_pretrained(theirs)
    written, expected = tensors_at(ours), tensors_at(theirs)
    assert {k: v.shape for k, v in written.items()} == {k: v.shape for k, v in expected.items()}
    assert config_at(ours) == config_at(theirs)
    assert json.loads((ours / "adapter_config.json").read_text())["rank_pattern"]
    before = output(both.ours, {"input_ids": both.batch["input_ids"]})
    for folder in (ours, theirs):
        loaded = multigraft.PeftModel.from_pretrained(build(oracle.llama), folder).eval()
        torch.testing.assert_close(loaded(both.batch["input_ids"]).logits, before, **CLOSE)
    with quiet():
        there = peft.PeftModel.from_pretrained(build(oracle.llama), ours).eval()
    torch.testing.assert_close(there(both.batch["input_ids"]).logits, before, **CLOSE)


def test_a_site_without_any_rank_is_saved_and_loaded(tmp_path: Path) -> None:
    both = trained()
    model = both.ours
    config = model.peft_config["default"]
    (first, *_) = config.rank_pattern
    config.rank_pattern[first] = [False] * 4
    with torch.no_grad():
        model.get_parameter(f"base_model.model.{first}.default").zero_()
    model.save_pretrained(tmp_path)
    before = model(both.batch["input_ids"]).logits
    loaded = multigraft.PeftModel.from_pretrained(build(oracle.llama), tmp_path).eval()
    torch.testing.assert_close(loaded(both.batch["input_ids"]).logits, before, **CLOSE)
    loaded.save_pretrained(tmp_path / "again")
    assert config_at(tmp_path / "again") == config_at(tmp_path)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(both.batch["input_ids"]).logits, before, **CLOSE)


def test_a_pruned_file_goes_into_the_model_that_it_came_from() -> None:
    both = trained()
    model = both.ours
    state = {k: v.clone() for k, v in multigraft.get_peft_model_state_dict(model).items()}
    before = model(both.batch["input_ids"]).logits
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    multigraft.set_peft_model_state_dict(model, state)
    torch.testing.assert_close(model(both.batch["input_ids"]).logits, before)
    fresh = {n: p.shape for n, p in model.named_parameters() if "lora_A" in n}
    assert all(shape[0] == 4 for shape in fresh.values()), "masked ranks stay in memory"


def test_loading_over_a_trained_adapter_takes_the_files_ranks(tmp_path: Path) -> None:
    both = trained()
    both.ours.save_pretrained(tmp_path)
    before = both.ours(both.batch["input_ids"]).logits
    with torch.no_grad():
        for parameter in both.ours.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    both.ours.load_adapter(tmp_path, "default")
    torch.testing.assert_close(both.ours(both.batch["input_ids"]).logits, before)


def test_a_pruned_adapter_can_be_trained_further(tmp_path: Path) -> None:
    both = trained()
    both.ours.save_pretrained(tmp_path)
    model = multigraft.PeftModel.from_pretrained(build(oracle.llama), tmp_path, is_trainable=True)
    losses = list(run(model, both.batch, 12))
    assert losses[-1] < losses[0]
    kept = sum(sum(mask) for mask in pattern_of(model).values())
    assert kept == 12, "the target is reached already"


def test_two_adapters_are_pruned_each_by_itself() -> None:
    model = get_peft_model(build(oracle.llama), oracle.our_config(TRAINED))
    model.add_adapter("other", oracle.our_config(TRAINED | {"target_r": 1}))
    batch = oracle.inputs(model)
    batch["labels"] = batch["input_ids"]
    alone = get_peft_model(build(oracle.llama), oracle.our_config(TRAINED))
    multigraft.set_peft_model_state_dict(alone, multigraft.get_peft_model_state_dict(model))
    list(run(alone, batch, 12))
    list(run(model, batch, 12))
    model.set_adapter("other")
    list(run(model, batch, 12))
    assert pattern_of(model) == pattern_of(alone)
    other = model.peft_config["other"].rank_pattern
    assert sum(sum(mask) for mask in other.values()) == 6


def test_scoring_without_gradients_says_when_to_call() -> None:
    model = get_peft_model(build(oracle.llama), oracle.our_config(TRAINED))
    with pytest.raises(StateError, match=r"after loss\.backward\(\) and before"):
        model.base_model.update_and_allocate(1)


def test_pruning_without_scores_says_so_and_prunes_nothing() -> None:
    model = get_peft_model(build(oracle.llama), oracle.our_config(TRAINED))
    with pytest.raises(StateError, match="nothing was observed"):
        model.base_model.update_and_allocate(9)
    assert model.peft_config["default"].rank_pattern is None


def test_other_methods_have_nothing_to_allocate() -> None:
    model = get_peft_model(build(oracle.llama), multigraft.LoraConfig(task_type="CAUSAL_LM"))
    model.base_model.update_and_allocate(1)


def test_hooks_call_at_every_step() -> None:
    seen = []
    model = nn.Module()
    model.base_model = nn.Module()
    model.base_model.update_and_allocate = seen.append
    hook, callback = StepHook(model), trainer_callback(model)
    hook(), hook("anything")
    callback.on_optimizer_step(None, type("State", (), {"global_step": 6}), None)
    assert seen == [1, 2, 7]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({}, "total_step"),
        ({"total_step": 5, "tinit": 3, "tfinal": 2}, "above `tinit` \\+ `tfinal` \\(=5\\)"),
        ({"total_step": 5, "init_r": 0}, "init_r"),
        ({"total_step": 5, "deltaT": 0}, "deltaT"),
        ({"total_step": 5, "beta1": 1.0}, "beta1"),
        ({"total_step": 5, "orth_reg_weight": -1.0}, "orth_reg_weight"),
        ({"total_step": 5, "use_dora": True}, "use_dora"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(options: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        AdaLoraConfig(**options)
