"""Preconditioned gradients are PEFT's, and the optimiser is an ordinary one in all else."""

from __future__ import annotations

from typing import Any

import peft.optimizers
import pytest
import torch

from multigraft import StateError, UnsupportedError, get_peft_model
from multigraft.errors import ConfigError
from multigraft.optimizers import create_riemannian_optimizer
from tests.combine.test_exact_sums import LAYERS, fill, grafted
from tests.optimizers.training import CONFIG, assert_same, own_steps, pair, steps, two_adapters
from tests.oracle import KINDS, Pair, build, llama, output, train_step

CASES: dict[str, dict[str, Any]] = {
    "linear": CONFIG,
    "every kind of layer": {"target_modules": KINDS, "r": 4},
    "dora": {**CONFIG, "use_dora": True},
    "rslora": {**CONFIG, "use_rslora": True},
    "saved modules": {**CONFIG, "modules_to_save": ["norm", "head"]},
}
CLASSES = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1, "eps": 1e-4}),
}


def both(made: Pair, kind: str = "sgd", **more: Any) -> tuple[Any, Any]:
    cls, own = CLASSES[kind]
    options: dict[str, Any] = {"lr": 1e-2, **own, **more}
    return (
        create_riemannian_optimizer(made.ours, cls, **options),
        peft.optimizers.create_riemannian_optimizer(made.theirs, cls, **options),
    )


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("case", CASES)
def test_steps_are_pefts(case: str, kind: str) -> None:
    made = pair(CASES[case])
    steps(made, *both(made, kind))
    assert_same(made)


def test_the_preconditioner_does_something() -> None:
    made = pair()
    ours, _ = both(made)
    plain = torch.optim.SGD(made.theirs.parameters(), lr=1e-2, momentum=0.9)
    steps(made, ours, plain)
    with pytest.raises(AssertionError):
        assert_same(made)


def test_a_transformer_is_trained_alike() -> None:
    made = pair({"target_modules": "all-linear", "r": 4}, llama)
    steps(made, *both(made, "adamw"))
    assert_same(made)


def test_an_inactive_adapter_stays_as_it_is() -> None:
    made = two_adapters()
    before = [p.clone() for p in made.ours.roster.parameters("other")]
    steps(made, *both(made))
    after = list(made.ours.roster.parameters("other"))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert_same(made)


def test_two_active_adapters_are_both_preconditioned() -> None:
    made = two_adapters()
    made.ours.set_adapter(["default", "other"])
    made.theirs.base_model.set_adapter(["default", "other"])
    steps(made, *both(made))
    assert_same(made)


def test_half_precision_is_computed_in_float32() -> None:
    made = pair({"target_modules": ["q_proj"], "r": 4}, lambda: build(llama).bfloat16())
    made.ours = get_peft_model(
        build(llama).bfloat16(), made.ours.peft_config["default"], autocast_adapter_dtype=False
    )
    fill(made.ours, "default", 0)
    optimizer = create_riemannian_optimizer(made.ours, torch.optim.SGD, lr=1.0)
    output(made.ours, made.batch).square().mean().backward()
    layer = made.ours.base_model.model.model.layers[0].self_attn.q_proj
    A, B = (f["default"].weight for f in (layer.lora_A, layer.lora_B))
    a, b, ga = A.double(), B.double(), A.grad.double()
    expected = a - torch.linalg.inv(b.T @ b + 1e-2 * torch.eye(4)) @ ga
    optimizer.step()
    torch.testing.assert_close(A.double(), expected, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("name", ["experts", "experts transposed"])
def test_each_expert_is_preconditioned_by_itself(name: str) -> None:
    model, x = grafted(name, 2)
    model.set_adapter("a")
    model.train()
    model(x).square().mean().backward()
    (_, graft) = next(iter(model.roster.grafts("a")))
    A, B = (graft.params[n] for n in graft.method.geometry.factors)
    pairs = graft.method.geometry.pairs
    a, b = pairs(graft.site.layer, A.detach(), B.detach())
    ga, gb = pairs(graft.site.layer, A.grad, B.grad)
    eye = 0.5 * torch.eye(2, dtype=a.dtype)
    new_a = torch.stack(
        [p - torch.linalg.inv(q.T @ q + eye) @ g for p, q, g in zip(a, b, ga, strict=True)]
    )
    new_b = torch.stack(
        [q - g @ torch.linalg.inv(p @ p.T + eye) for p, q, g in zip(a, b, gb, strict=True)]
    )
    create_riemannian_optimizer(model, torch.optim.SGD, lr=1.0, reg=0.5).step()
    found = pairs(graft.site.layer, A.detach(), B.detach())
    torch.testing.assert_close(found, (new_a, new_b))
    assert len(LAYERS) > 2 and len(a) == 3


def test_gradients_are_as_they_were_after_the_step() -> None:
    made = pair()
    ours, _ = both(made)
    train_step(made)
    before = {n: p.grad.clone() for n, p in made.ours.named_parameters() if p.grad is not None}
    ours.step()
    after = {n: p.grad for n, p in made.ours.named_parameters() if p.grad is not None}
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_a_closure_is_run_once_and_its_gradients_are_preconditioned() -> None:
    made = pair()
    ours, theirs = both(made)
    calls = []

    def closure() -> torch.Tensor:
        made.ours.zero_grad()
        loss = output(made.ours, made.batch).square().mean()
        loss.backward()
        calls.append(loss)
        return loss

    for _ in range(3):
        assert ours.step(closure) is calls[-1]
        train_step(made)
        theirs.step()
    assert len(calls) == 3
    assert_same(made)


def test_it_is_of_the_class_that_was_asked_for_and_its_state_goes_on() -> None:
    whole, halves = pair(), pair()
    own_steps(whole, both(whole, "adamw")[0], 4)
    first, _ = both(halves, "adamw")
    assert type(first) is torch.optim.AdamW
    own_steps(halves, first, 2)
    second = both(halves, "adamw")[0]
    second.load_state_dict(first.state_dict())
    own_steps(halves, second, 2)
    for a, b in zip(whole.ours.parameters(), halves.ours.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_schedule_can_hold_it() -> None:
    made = pair()
    ours, _ = both(made)
    schedule = torch.optim.lr_scheduler.LambdaLR(ours, lambda step: 1 / (step + 1))
    train_step(made)
    ours.step()
    schedule.step()
    assert ours.param_groups[0]["lr"] == 5e-3


def test_what_cannot_be_is_refused() -> None:
    made = pair()
    with pytest.raises(UnsupportedError, match="LBFGS needs a closure"):
        create_riemannian_optimizer(made.ours, torch.optim.LBFGS, lr=1.0)
    with pytest.raises(ConfigError, match=r"`reg` .=-1. must be"):
        create_riemannian_optimizer(made.ours, torch.optim.SGD, lr=1.0, reg=-1)
    with pytest.raises(StateError, match="no pair of LoRA's factors trains"):
        create_riemannian_optimizer(pair({"target_modules": ["emb"]}).ours, torch.optim.SGD, lr=1.0)
