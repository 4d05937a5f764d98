"""kernels/node.py: a node is a function to autograd and to torch.func, and is called directly."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from multigraft import LoraConfig, get_peft_model
from multigraft.kernels.adapted_linear import _AdaptedLinears
from multigraft.kernels.node import Node


class Cube(Node):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        x, scale = inputs
        return x**3 * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.scale = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grads[0] * 3 * x**2 * ctx.scale, None


def cube(x: Tensor) -> Tensor:
    out: Tensor = Cube.apply(x, 2.0)
    return out


def test_values_and_first_and_second_gradients_are_the_functions() -> None:
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    assert cube(x).tolist() == [2.0, 16.0]
    assert torch.autograd.gradcheck(cube, x)
    assert torch.autograd.gradgradcheck(cube, x)


def test_transforms_of_torch_func_go_through() -> None:
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    found = torch.func.vmap(torch.func.grad(lambda x: cube(x).sum()))(rows)
    torch.testing.assert_close(found, 6 * rows**2)


def test_no_call_looks_at_a_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a signature was worked out")

    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    adapted = get_peft_model(model, LoraConfig(target_modules=["0"], r=2))
    with monkeypatch.context() as patch:
        patch.setattr(inspect, "signature", refuse)
        adapted(torch.randn(2, 4)).sum().backward()
    assert model[0].lora_B["default"].weight.grad is not None


def test_the_kernel_is_a_node() -> None:
    assert issubclass(_AdaptedLinears, Node)
