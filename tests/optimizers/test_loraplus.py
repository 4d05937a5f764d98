"""LoRA+ makes PEFT's groups with PEFT's rates, and so its steps."""

from __future__ import annotations

import copy
from typing import Any

import peft.optimizers
import pytest
import torch
from torch import nn

from multigraft import LoraConfig, StateError, get_peft_model
from multigraft.errors import ConfigError, MultigraftWarning
from multigraft.optimizers import create_loraplus_optimizer
from tests.optimizers.training import CONFIG, assert_same, own_steps, pair, steps, two_adapters
from tests.oracle import KINDS, Net, Pair, llama, plain_name

OPTIONS: dict[str, Any] = {
    "lr": 1e-2,
    "loraplus_lr_ratio": 4.0,
    "loraplus_weight_decay": 0.1,
    "loraplus_lr_embedding": 3e-3,
}
CASES: dict[str, dict[str, Any]] = {
    "linear": CONFIG,
    "every kind of layer": {"target_modules": KINDS, "r": 4},
    "dora": {**CONFIG, "use_dora": True},
    "lora_bias": {**CONFIG, "lora_bias": True},
    "saved modules": {**CONFIG, "modules_to_save": ["norm", "head"]},
    "adalora": {"kind": "AdaLoraConfig", "target_modules": ["lin0"], "init_r": 3, "total_step": 9},
    "vera": {"kind": "VeraConfig", "target_modules": ["lin0", "lin1"], "r": 4},
    "loha": {"kind": "LoHaConfig", "target_modules": ["lin0", "lin1"], "r": 2},
    "trained biases": {**CONFIG, "bias": "lora_only"},
}


def both(made: Pair, **more: Any) -> tuple[Any, Any]:
    options = {**OPTIONS, **more}
    return (
        create_loraplus_optimizer(made.ours, torch.optim.AdamW, **options),
        peft.optimizers.create_loraplus_optimizer(made.theirs, torch.optim.AdamW, **options),
    )


def named_groups(model: nn.Module, optimizer: Any) -> list[tuple[set[str], float, float]]:
    names = {id(p): plain_name(n) for n, p in model.named_parameters()}
    return [
        ({names[id(p)].replace("bias_copy_", "") for p in g["params"]}, g["lr"], g["weight_decay"])
        for g in optimizer.param_groups
    ]


@pytest.mark.parametrize("case", CASES)
def test_the_groups_are_pefts(case: str) -> None:
    made = pair(CASES[case])
    ours, theirs = both(made)
    assert named_groups(made.ours, ours) == named_groups(made.theirs, theirs)
    assert sum(len(names) for names, _, _ in named_groups(made.ours, ours)) >= 3


@pytest.mark.parametrize("case", CASES)
def test_steps_are_pefts(case: str) -> None:
    made = pair(CASES[case])
    steps(made, *both(made))
    assert_same(made)


def test_a_transformer_is_trained_alike() -> None:
    made = pair({"target_modules": "all-linear", "r": 4}, llama)
    steps(made, *both(made))
    assert_same(made)


def test_only_the_active_adapter_is_in_the_groups() -> None:
    made = two_adapters()
    ours, _ = both(made)
    inside = {id(p) for g in ours.param_groups for p in g["params"]}
    own = {id(p) for p in made.ours.roster.parameters("default")}
    assert inside == own


def test_names_of_modules_do_not_decide() -> None:
    """PEFT takes any parameter with `lora_B` in its path for a B."""
    base = nn.Sequential()
    base.add_module("my_lora_B", nn.Linear(4, 4))
    model = get_peft_model(base, LoraConfig(target_modules=["my_lora_B"], r=2))
    optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=1.0, loraplus_lr_ratio=2.0)
    groups = [[p.shape for p in g["params"]] for g in optimizer.param_groups]
    assert groups == [[(2, 4)], [], [(4, 2)], []]


class Wrapped(nn.Module):
    """As DistributedDataParallel holds a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_a_wrapped_model_has_the_same_groups() -> None:
    made = pair()
    plain, _ = both(made)
    wrapped = create_loraplus_optimizer(Wrapped(made.ours), torch.optim.AdamW, **OPTIONS)
    for a, b in zip(plain.param_groups, wrapped.param_groups, strict=True):
        assert list(map(id, a["params"])) == list(map(id, b["params"]))


def test_states_go_through_a_file_and_on(tmp_path: Any) -> None:
    """Interrupted after two steps and continued, it comes out where it does uninterrupted."""
    whole, halves = pair(), pair()
    optimizer = both(whole)[0]
    own_steps(whole, optimizer, 4)
    first = both(halves)[0]
    own_steps(halves, first, 2)
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    second = both(halves)[0]
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    own_steps(halves, second, 2)
    for a, b in zip(whole.ours.parameters(), halves.ours.parameters(), strict=True):
        assert torch.equal(a, b)


def test_pefts_state_can_be_continued() -> None:
    made = pair()
    ours, theirs = both(made)
    steps(made, ours, theirs, 2)
    taken = both(made)[0]
    taken.load_state_dict(copy.deepcopy(theirs.state_dict()))
    steps(made, taken, theirs, 2)
    assert_same(made)


def test_a_decay_that_every_group_overrides_is_warned_of() -> None:
    with pytest.warns(MultigraftWarning, match="Use `loraplus_weight_decay`"):
        both(pair(), weight_decay=0.1)


def test_what_cannot_be_is_refused() -> None:
    made = pair()
    with pytest.raises(ConfigError, match=r"`loraplus_lr_ratio` .=0. must be a finite"):
        create_loraplus_optimizer(made.ours, torch.optim.SGD, lr=1.0, loraplus_lr_ratio=0)
    with pytest.raises(ConfigError, match=r"must be a class of torch.optim"):
        create_loraplus_optimizer(made.ours, Net, lr=1.0, loraplus_lr_ratio=2)  # type: ignore[arg-type]
    made.ours.set_requires_grad("default", False)
    with pytest.raises(StateError, match="no parameter requires gradients"):
        create_loraplus_optimizer(made.ours, torch.optim.SGD, lr=1.0, loraplus_lr_ratio=2)
