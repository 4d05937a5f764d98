"""AdamW with a state of a byte a value: near AdamW, small, and taken up where it was put down."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from multigraft import LoraConfig
from multigraft.errors import MissingExtraError
from multigraft.optimizers.eight_bit import adamw8bit, paged_adamw8bit
from multigraft.planning.optimizers import STATES, maker
from multigraft.train import Lane, Recipe, attach, load_model, optimizer, train
from multigraft.train.together import step
from tests.tiny_base import numbers, write_base

NAMES = ["adamw8bit", "paged_adamw8bit"]


def made(name, parameters):
    return optimizer.make(name, parameters, lr=1e-2, weight_decay=0.01, options={})


def stepped(name, steps=5, size=8192):
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(size))
    goal = torch.randn(size)
    own = made(name, [parameter])
    for _ in range(steps):
        parameter.grad = parameter.detach() - goal
        own.step()
    return parameter.detach(), own


@pytest.mark.parametrize("name", NAMES)
def test_it_goes_nearly_where_adamw_goes(name):
    pytest.importorskip("bitsandbytes")
    found, _ = stepped(name)
    exact, _ = stepped("adamw")
    start, _ = stepped("adamw", steps=0)
    assert (found - exact).norm() < 0.05 * (exact - start).norm()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [64, 4096, 5000, 70000])
def test_its_state_takes_what_is_planned(name, size):
    pytest.importorskip("bitsandbytes")
    _, own = stepped(name, 1, size)
    (state,) = own.state.values()
    tables = {"qmap1", "qmap2"}  # one of each for all parameters
    real = sum(
        value.nbytes
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and key not in tables
    )
    assert real == STATES[name](size)


def test_a_plan_holds_states_of_that_size_on_the_meta_device():
    parameter = torch.nn.Parameter(torch.empty(70000, device="meta"))
    own = maker("adamw8bit")([parameter])
    own.step()
    (state,) = own.state.values()
    assert sum(tensor.nbytes for tensor in state.values()) == STATES["adamw8bit"](70000)


@pytest.mark.parametrize(("make", "name"), [(adamw8bit, NAMES[0]), (paged_adamw8bit, NAMES[1])])
def test_without_the_package_the_extra_is_named(monkeypatch, make, name):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match=rf"`{name}` needs bitsandbytes: pip install"):
        make([torch.nn.Parameter(torch.zeros(4))], lr=1e-3)


def test_a_lane_goes_on_from_its_checkpoint_with_the_same_bits(tmp_path):
    pytest.importorskip("bitsandbytes")
    from safetensors.torch import load_file, save_file

    base_dir = write_base(tmp_path)

    def lane():
        config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
        model = attach(load_model(base_dir), config, "a")
        recipe = Recipe(steps=6, batch_size=2, lr=1e-2, optimizer="adamw8bit")
        return model, Lane(model, "a", numbers(8), recipe)

    model, whole = lane()
    losses = train(model, whole)

    model, first = lane()
    for _ in range(3):
        step(model, [first])
    tensors, values = first.state()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "a")
    model, second = lane()
    second.restore(load_file(tmp_path / "a"), json.loads(json.dumps(values)))
    assert any(
        t.dtype == torch.uint8 for s in second.optimizer.state.values() for t in tensors_of(s)
    )
    train(model, second)
    assert second.losses == losses


def tensors_of(state):
    return [value for value in state.values() if isinstance(value, torch.Tensor)]
