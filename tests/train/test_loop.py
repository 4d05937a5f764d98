"""The training loop: it learns, it is repeatable, and adapters don't meet."""

from __future__ import annotations

import signal

import pytest
import torch

from multigraft import (
    AdaLoraConfig,
    LoraConfig,
    StateError,
    TrainingError,
    get_peft_model_state_dict,
)
from multigraft.train import Lane, Recipe, attach, load_model, train
from tests.tiny_base import numbers

NAMES = ("a", "b", "c")


def config(**options: object) -> LoraConfig:
    options = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, **options}
    return LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **options)


def recipe(**options: object) -> Recipe:
    options = {"steps": 4, "batch_size": 4, "lr": 1e-2, **options}
    return Recipe(**options)


def lane(model, name: str = "default", count: int = 8, **options: object) -> Lane:
    return Lane(model, name, numbers(count), recipe(**options))


@pytest.fixture
def model(base_dir):
    return attach(load_model(base_dir), config(), "default")


def test_training_lowers_the_loss(model):
    losses = train(model, lane(model, steps=40))
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_only_the_adapter_changes(model):
    before = {n: p.clone() for n, p in model.named_parameters()}
    train(model, lane(model))
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all(".lora_A.default." in n or ".lora_B.default." in n for n in changed)


def test_adapters_trained_on_one_base_equal_those_trained_alone(base_dir):
    together = load_model(base_dir)
    for name in NAMES:
        together = attach(together, config(), name, seed=3)
    found = {}
    for count, name in enumerate(NAMES, start=7):
        losses = train(together, lane(together, name, count))
        found[name] = (losses, get_peft_model_state_dict(together, adapter_name=name))
    for count, name in enumerate(NAMES, start=7):
        alone = attach(load_model(base_dir), config(), name, seed=3)
        assert train(alone, lane(alone, name, count)) == found[name][0]
        state = get_peft_model_state_dict(alone, adapter_name=name)
        assert state.keys() == found[name][1].keys()
        assert all(torch.equal(tensor, found[name][1][key]) for key, tensor in state.items())


def test_the_seed_decides_the_run_and_leaves_the_callers_numbers_alone(base_dir):
    def run(seed: int) -> list[float]:
        model = attach(load_model(base_dir), config(), "default", seed)
        return train(model, lane(model, seed=seed))

    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = run(1)
    assert torch.equal(torch.rand(3), expected)
    assert run(1) == first
    assert run(2) != first


def test_progress_is_told_after_every_step(model):
    told = []
    train(model, lane(model), told.append)
    assert [(now.step, now.steps, now.adapter) for now in told] == [
        (n, 4, "default") for n in range(1, 5)
    ]
    assert told[-1].tokens == 4 * 4 * 6
    assert told[-1].seconds_left == 0.0
    assert told[0].seconds_left > 0.0
    assert told[-1].tokens_per_second > 0.0


def test_the_model_comes_back_in_its_mode_without_gradients(model):
    model.eval()
    train(model, lane(model))
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_a_callback_may_stop_a_run_and_the_lane_goes_on_from_there(base_dir):
    whole = attach(load_model(base_dir), config(lora_dropout=0.0), "default")
    expected = train(whole, lane(whole, steps=6))
    model = attach(load_model(base_dir), config(lora_dropout=0.0), "default")
    own = lane(model, steps=6)

    def stop(now) -> None:
        if now.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model, own, stop)
    assert own.step == 2
    assert train(model, own) == expected[2:]


def test_ctrl_c_during_a_step_takes_effect_between_steps(model):
    own = lane(model)
    step = own.optimizer.step

    def interrupted() -> None:
        signal.raise_signal(signal.SIGINT)
        step()

    own.optimizer.step = interrupted
    before = [p.clone() for p in own.parameters]
    with pytest.raises(KeyboardInterrupt):
        train(model, own)
    assert own.step == 1
    assert any(not torch.equal(p, b) for p, b in zip(own.parameters, before, strict=True))


def test_a_loss_that_is_not_finite_stops_before_the_step(model):
    own = lane(model)
    with torch.no_grad():
        own.parameters[-1].fill_(float("nan"))
    after = [p.clone() for p in own.parameters]
    with pytest.raises(TrainingError, match="step 1 of 4: the loss is nan"):
        train(model, own)
    assert own.step == 0
    assert all(torch.equal(p, a) for p, a in zip(own.parameters[:-1], after[:-1], strict=True))


def test_a_gradient_that_is_not_finite_changes_nothing(model):
    own = lane(model)
    before = [p.clone() for p in own.parameters]
    own.parameters[0].register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(TrainingError, match="step 1 of 4: the gradient is not finite"):
        train(model, own)
    assert all(torch.equal(p, b) for p, b in zip(own.parameters, before, strict=True))


def test_running_out_of_memory_says_what_to_lower(model, monkeypatch):
    def forward(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(model.get_base_model(), "forward", forward)
    with pytest.raises(TrainingError, match=r"out of memory\. Lower `batch_size` \(=4\)"):
        train(model, lane(model))


def test_a_merged_adapter_is_not_trained(model):
    own = lane(model)
    model.merge_adapter()
    with pytest.raises(StateError, match="`default` is merged into the base"):
        train(model, own)


def test_disabled_adapters_are_not_trained(model):
    with model.disable_adapter(), pytest.raises(StateError, match="disabled"):
        train(model, lane(model))


def adalora(base_dir, orth_reg_weight: float = 0.5):
    ranks = AdaLoraConfig(
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        init_r=4,
        target_r=2,
        tinit=2,
        tfinal=3,
        deltaT=1,
        total_step=10,
        orth_reg_weight=orth_reg_weight,
    )
    return attach(load_model(base_dir), ranks, "default")


def test_a_method_that_changes_in_training_is_called_at_every_step(base_dir):
    model = adalora(base_dir)
    assert not model.peft_config["default"].rank_pattern
    train(model, lane(model, steps=10))
    kept = model.peft_config["default"].rank_pattern
    sites = len(model.base_model.layers())
    assert sum(sum(mask) for mask in kept.values()) <= 2 * sites + sites // 2


def test_what_a_method_adds_to_the_loss_is_learned_and_not_reported(base_dir):
    plain, bound = adalora(base_dir, 1e-9), adalora(base_dir, 10.0)
    first = train(plain, lane(plain, steps=1)), train(bound, lane(bound, steps=1))
    assert first[0] == first[1]
    one, two = (get_peft_model_state_dict(m) for m in (plain, bound))
    assert any(not torch.equal(one[key], two[key]) for key in one)
