"""LoRA-FA trains as PEFT's does where that works, and works where that does not."""

from __future__ import annotations

import copy
from typing import Any

import peft.optimizers
import pytest
import torch

from multigraft import StateError
from multigraft.errors import ConfigError
from multigraft.optimizers import LoraFAOptimizer, create_lorafa_optimizer
from tests.optimizers.training import (
    CONFIG,
    all_values,
    assert_same,
    own_steps,
    pair,
    steps,
    two_adapters,
)
from tests.oracle import Pair, llama, output, train_step

RATE = 1e-2


@pytest.fixture(autouse=True)
def _peft_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU it rounds the projected gradient to bfloat16."""
    monkeypatch.setattr(peft.optimizers.lorafa, "is_bf16_available", lambda: False)


def make(model: Any, library: Any = None, **more: Any) -> Any:
    function = create_lorafa_optimizer if library is None else library.create_lorafa_optimizer
    return function(model, r=4, lora_alpha=6, lr=RATE, **more)


def both(made: Pair, **more: Any) -> tuple[Any, Any]:
    return make(made.ours, **more), make(made.theirs, peft.optimizers, **more)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        {**CONFIG, "use_rslora": True},
        {**CONFIG, "alpha_pattern": {"lin1": 1}},
        {**CONFIG, "modules_to_save": ["norm", "head"]},
        {**CONFIG, "r": 1, "rank_pattern": {}},
    ],
    ids=["ranks", "rslora", "alphas", "saved modules", "rank 1"],
)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_steps_are_pefts(config: dict[str, Any], decay: float) -> None:
    made = pair(config)
    steps(made, *both(made, weight_decay=decay), 4)
    assert_same(made)


def test_a_transformer_is_trained_alike() -> None:
    made = pair({"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4}, llama)
    steps(made, *both(made))
    assert_same(made)


def test_the_gradient_is_the_nearest_to_the_whole_weights() -> None:
    """For a frozen A, no other change of B comes as near to full fine-tuning's."""
    made = pair({**CONFIG, "target_modules": ["lin0"], "rank_pattern": {}})
    layer = made.ours.base_model.model.lin0
    optimizer = make(made.ours)
    layer.base_layer.weight.requires_grad_(True)
    output(made.ours, made.batch).square().mean().backward()
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    s, whole = layer.scaling["default"], layer.base_layer.weight.grad
    expected = torch.linalg.lstsq(s * A.T, whole.T).solution.T
    optimizer.step()
    mean = optimizer.state[B]["exp_avg"] / 0.1
    torch.testing.assert_close(mean, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_no_bit_of_a_frozen_factor_changes(decay: float) -> None:
    made = pair()
    before = all_values(made.ours)
    steps(made, *both(made, weight_decay=decay), 3)
    after = all_values(made.ours)
    for name, value in after.items():
        assert torch.equal(value, before[name]) == (".lora_B." not in name), name


def test_frozen_factors_take_no_gradient_even_when_the_adapter_is_activated_again() -> None:
    made = two_adapters()
    optimizer = make(made.ours)
    made.ours.set_adapter("other")
    made.ours.set_adapter("default")
    optimizer.step()
    made.ours.zero_grad()
    output(made.ours, made.batch).square().mean().backward()
    frozen = [p for n, p in made.ours.named_parameters() if ".lora_A." in n]
    assert frozen and not any(p.requires_grad or p.grad is not None for p in frozen)


def test_releasing_gives_the_factors_back() -> None:
    made = pair()
    flags = {n: p.requires_grad for n, p in made.ours.named_parameters()}
    optimizer = make(made.ours)
    assert flags != {n: p.requires_grad for n, p in made.ours.named_parameters()}
    optimizer.release()
    assert flags == {n: p.requires_grad for n, p in made.ours.named_parameters()}


def test_an_adapter_that_does_not_train_keeps_values_and_flags() -> None:
    """PEFT's fails at the first step when there is an inactive adapter."""
    made = two_adapters()
    others = list(made.ours.roster.parameters("other"))
    made.ours.set_requires_grad("other", False)
    before = [p.clone() for p in others]
    optimizer = make(made.ours)
    train_step(made)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, others, strict=True))
    assert not any(p.requires_grad for p in others)


def test_two_active_adapters_train_side_by_side() -> None:
    made = two_adapters()
    made.ours.set_adapter(["default", "other"])
    made.theirs.base_model.set_adapter(["default", "other"])
    own = make(made.ours)
    before = all_values(made.ours)
    train_step(made)
    own.step()
    for name, value in all_values(made.ours).items():
        assert torch.equal(value, before[name]) == (".lora_B." not in name), name


@pytest.mark.parametrize("targets", [["conv1"], ["conv2"], ["conv3"]])
def test_convolutions_are_projected_group_by_group(targets: list[str]) -> None:
    """PEFT's fails on a kernel."""
    made = pair({"target_modules": targets, "r": 4})
    optimizer = make(made.ours)
    output(made.ours, made.batch).square().mean().backward()
    (_, graft) = next(iter(made.ours.roster.grafts("default")))
    A, B = (graft.params[n] for n in graft.method.geometry.factors)
    pairs = graft.method.geometry.pairs
    a, g = pairs(graft.site.layer, A.detach(), B.grad)
    expected = g @ torch.linalg.inv(a @ a.mT) / graft.method.scaling**2
    optimizer.step()
    found = pairs(graft.site.layer, A.detach(), optimizer.state[B]["exp_avg"] / 0.1)[1]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_embeddings_magnitudes_and_biases_are_trained_by_adamw() -> None:
    config = {**CONFIG, "target_modules": ["emb", "lin0"], "use_dora": True, "rank_pattern": {}}
    made = pair(config)
    optimizer = make(made.ours)
    others = {
        n: p for n, p in made.ours.named_parameters() if "lora_embedding" in n or "magnitude" in n
    }
    before = {n: p.detach().clone() for n, p in others.items()}
    output(made.ours, made.batch).square().mean().backward()
    optimizer.step()
    assert len(others) == 4
    for name, p in others.items():
        root = (1e-3 * p.grad.square()).sqrt() + 1e-6
        expected = before[name] - RATE * (1e-3**0.5 / 0.1) * 0.1 * p.grad / root
        torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=1e-5)


def test_the_scaling_is_the_sites_own_now() -> None:
    made, twice = pair(), pair()
    for layer in twice.ours.base_model.layers():
        layer.scale_layer(2.0)
    first, second = make(made.ours), make(twice.ours)
    for model in (made.ours, twice.ours):
        torch.manual_seed(0)
        for _, graft in model.roster.grafts("default"):
            B = graft.params["lora_B.weight"]
            B.grad = torch.randn_like(B)
    first.step()
    second.step()
    for (_, a), (_, b) in zip(
        made.ours.roster.grafts("default"), twice.ours.roster.grafts("default"), strict=True
    ):
        own, other = (
            o.state[g.params["lora_B.weight"]]["exp_avg"] for o, g in ((first, a), (second, b))
        )
        torch.testing.assert_close(own, 4 * other)


def test_a_closure_gives_its_loss() -> None:
    made = pair()
    optimizer = make(made.ours)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = output(made.ours, made.batch).square().mean()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


def test_states_go_through_a_file_and_on(tmp_path: Any) -> None:
    whole, halves = pair(), pair()
    own_steps(whole, both(whole)[0], 4)
    first, _ = both(halves)
    own_steps(halves, first, 2)
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    second = make(halves.ours)
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    own_steps(halves, second, 2)
    for a, b in zip(whole.ours.parameters(), halves.ours.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_copy_with_its_model_trains_on_by_itself() -> None:
    made = pair()
    optimizer = make(made.ours)
    train_step(made)
    model, twin = copy.deepcopy((made.ours, optimizer))
    optimizer.step()
    for p, q in zip(made.ours.parameters(), model.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    twin.step()
    for a, b in zip(made.ours.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_without_pairs_it_is_adamw() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    twin = torch.nn.Parameter(torch.ones(3))
    optimizers = [
        LoraFAOptimizer([weight], lr=RATE, eps=1e-10),
        torch.optim.AdamW([twin], lr=RATE, eps=1e-10, weight_decay=0),
    ]
    for p, optimizer in zip((weight, twin), optimizers, strict=True):
        for value in (1.0, -3.0, 2.0):
            p.grad = torch.full_like(p, value)
            optimizer.step()
    torch.testing.assert_close(weight, twin)


def test_what_cannot_be_is_refused() -> None:
    made = pair()
    with pytest.raises(ConfigError, match=r"`use_rslora` .=True. is not what the configs"):
        make(made.ours, use_rslora=True)
    with pytest.warns(FutureWarning, match="`use_rslora` is deprecated"):
        make(made.ours, use_rslora=False)
    with pytest.raises(ConfigError, match=r"`lr` .=-1. must be"):
        create_lorafa_optimizer(made.ours, 4, 6, lr=-1)
    with pytest.raises(ConfigError, match="`betas`"):
        LoraFAOptimizer(made.ours.parameters(), betas=(0.9, 1.0))
    made.ours.set_requires_grad("default", False)
    with pytest.raises(StateError, match="no LoRA trains"):
        make(made.ours)
