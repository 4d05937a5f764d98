"""DoRA against PEFT: magnitude and direction apart, at every kind of layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import peft
import pytest
import torch
from torch import Tensor, nn

import multigraft
from tests.methods.against_peft import Case, DropsLikePeft, filled, near
from tests.oracle import our_config, peft_config, peft_state, quiet

DORA = {"r": 4, "lora_alpha": 6, "use_dora": True}


class TestDora(DropsLikePeft):
    kind = "LoraConfig"
    cases: ClassVar = {
        "linear": Case("linear", DORA),
        "no bias": Case("linear wide", DORA),
        "Conv1D": Case("conv1d_transposed", DORA),
        "embedding": Case("embedding", DORA),
        "conv1d": Case("conv1d", DORA),
        "conv2d": Case("conv2d", DORA),
        "conv2d 1x1": Case("conv2d 1x1", DORA),
        "conv3d": Case("conv3d", DORA),
        "rsLoRA": Case("linear", DORA | {"use_rslora": True}),
        "dropout in evaluation": Case("linear", DORA | {"lora_dropout": 0.5}),
    }
    dropping: ClassVar = {
        layer: Case(layer, DORA | {"lora_dropout": 0.5})
        for layer in ("linear", "conv1d_transposed", "conv2d")
    }


def test_the_magnitude_starts_as_the_weights_norm() -> None:
    for layer in ("linear", "conv1d_transposed", "embedding", "conv2d"):
        case = Case(layer)
        options = {"target_modules": ["layer"], **DORA}
        ours = multigraft.get_peft_model(case.model(), our_config(options)).double()
        with quiet():
            theirs = peft.get_peft_model(case.model(), peft_config(options)).double()
        key = "base_model.model.layer.lora_magnitude_vector"
        own = multigraft.get_peft_model_state_dict(ours)[key]
        expected = peft_state(theirs)[key]
        assert own.shape == expected.shape
        torch.testing.assert_close(own, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("layer", ["linear", "conv1d_transposed", "embedding", "conv2d"])
def test_two_adapters_at_once_add_up(layer: str) -> None:
    """Each changes the base's own output.

    PEFT's second one also scales the first one's change, but not in training with dropout.
    """
    case = Case(layer)
    base = case.model()
    layer_of = base.layer
    model = multigraft.get_peft_model(base, our_config({"target_modules": ["layer"], **DORA}))
    model.add_adapter("other", our_config({"target_modules": ["layer"], **DORA, "r": 2}))
    model.double().eval()
    for name, noise in (("default", 0.3), ("other", 0.5)):
        state = multigraft.get_peft_model_state_dict(model, adapter_name=name)
        multigraft.set_peft_model_state_dict(model, filled(state, noise), name)
    x = case.model().batch()
    adapted = base.layer
    plain = layer_of(x)
    changes = []
    for name in ("default", "other"):
        model.set_adapter(name)
        changes.append(adapted(x) - plain)
        assert changes[-1].abs().max() > 0.1
    model.set_adapter(["default", "other"])
    near(adapted(x), plain + changes[0] + changes[1])


class Experts(nn.Module):
    """A stack of weights that its forward reads, ``(experts, out, in)`` or turned."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        shape = (3, 6, 5) if is_transposed else (3, 5, 6)
        self.stack = nn.Parameter(torch.randn(shape, dtype=torch.float64))
        self.is_transposed = is_transposed

    def forward(self, x: Tensor) -> Tensor:
        """``(..., 6)`` to ``(..., 5)``: the experts' outputs, each bounded, summed."""
        W = self.stack.mT if self.is_transposed else self.stack
        return torch.stack([torch.tanh(x @ w.T) for w in W]).sum(0)


def experts(is_transposed: bool) -> tuple[nn.Module, Any]:
    """The base, and it with a filled DoRA on the stack."""
    torch.manual_seed(0)
    base = nn.Sequential(Experts(is_transposed))
    config = multigraft.LoraConfig(target_parameters=["stack"], target_modules=[], **DORA)
    model = multigraft.get_peft_model(base, config).double()
    state = multigraft.get_peft_model_state_dict(model)
    multigraft.set_peft_model_state_dict(model, filled(state, 0.4))
    return base, model


@pytest.mark.parametrize("is_transposed", [False, True])
def test_each_fused_expert_has_a_magnitude_of_its_own(is_transposed: bool) -> None:
    base, model = experts(is_transposed)
    held = base[0]
    (graft,) = held.all_grafts()
    A, B, m = graft.params.values()
    assert m.shape == (3, 5)
    W = held.base_layer.stack
    twin = [
        nn.Parameter(tensor.detach().clone())
        for tensor in (A.unflatten(0, (3, 4)), B.unflatten(1, (4, 3)).permute(2, 0, 1), m)
    ]
    a, b, own = twin
    V = (W.mT if is_transposed else W) + 1.5 * b @ a
    adapted = own[..., None] * V / V.detach().norm(dim=2, keepdim=True)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([torch.tanh(x @ w.T) for w in adapted]).sum(0)
    found = model(x)
    near(found, expected)
    first = torch.autograd.grad(found.square().sum(), [x, A, B, m])
    second = torch.autograd.grad(expected.square().sum(), [x, a, b, own])
    near(first[0], second[0])
    near(first[1], second[1].flatten(0, 1))
    near(first[2], second[2].permute(1, 2, 0).flatten(1))
    near(first[3], second[3])


def test_a_new_adapter_on_experts_leaves_them_and_its_file_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = multigraft.LoraConfig(target_parameters=["stack"], target_modules=[], **DORA)
    base = nn.Sequential(Experts(False))
    x = torch.randn(4, 6, dtype=torch.float64)
    before = base(x)
    model = multigraft.get_peft_model(base, config).double()
    torch.testing.assert_close(model(x), before)
    multigraft.set_peft_model_state_dict(
        model, filled(multigraft.get_peft_model_state_dict(model), 0.4)
    )
    model.save_pretrained(tmp_path)
    twin = nn.Sequential(Experts(False))
    twin.load_state_dict({"0.stack": base[0].base_layer.stack})
    again = multigraft.PeftModel.from_pretrained(twin, tmp_path, autocast_adapter_dtype=False)
    near(again.double()(x), model(x))
    expected = model(x)
    near(model.merge_and_unload()(x), expected)


def test_rows_of_a_batch_train_magnitudes_of_their_own() -> None:
    """With dropout too; PEFT refuses `adapter_names` with DoRA."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5)).double()
    options = {"target_modules": ["0"], **DORA}
    model = multigraft.get_peft_model(base, our_config(options), "a")
    model.add_adapter("b", our_config(options | {"r": 2}))
    model.add_adapter("plain", our_config({"target_modules": ["0"], "r": 2}))
    model.double()
    for name in ("a", "b", "plain"):
        state = multigraft.get_peft_model_state_dict(model, adapter_name=name)
        multigraft.set_peft_model_state_dict(model, filled(state, 0.4), name)
        model.set_requires_grad(name)
    x = torch.randn(5, 6, dtype=torch.float64)
    names = ["a", "b", "plain", "__base__", "a"]
    found = model.train()(x, adapter_names=names)
    found.square().sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for name in ("a", "b", "plain"):
        model.set_adapter(name)
        rows = [i for i, other in enumerate(names) if other == name]
        y = model(x[rows])
        near(found[rows], y)
        y.square().sum().backward()
        for n, p in model.named_parameters():
            if p.grad is not None and f".{name}." in n:
                near(grads.pop(n), p.grad, n)
        model.zero_grad()
    assert not grads


def test_experts_keep_no_second_stack_for_their_gradients() -> None:
    base, model = experts(False)
    held, kept = base[0], []
    own = held.base_layer.stack

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(torch.randn(2, 6, dtype=torch.float64))
    large = {t.data_ptr() for t in kept if t.numel() == own.numel()}
    assert large == {own.data_ptr()}
