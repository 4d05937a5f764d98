"""Base layer and pairs in one node: when it is taken, and that it changes nothing but rounding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from multigraft import LoraConfig, PeftModel, get_peft_model
from multigraft.fused import fused

Change = Callable[[nn.Linear], object]


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(..., 6) to (..., 5)."""
        return self.layer(x)


def adapted(adapters: int = 1, **options: object) -> PeftModel:
    torch.manual_seed(0)
    model = None
    for index in range(adapters):
        options = {"init_lora_weights": False, "lora_alpha": 3 + index, **options}
        config = LoraConfig(r=2 + index, target_modules=["layer"], **options)  # type: ignore[arg-type]
        if model is None:
            model = get_peft_model(One().double().requires_grad_(False), config, "a0")
        else:
            model.add_adapter(f"a{index}", config)
    assert model is not None
    return model


def whole(model: PeftModel, x: Tensor) -> Tensor | None:
    layer = model.get_base_model().layer
    return fused(layer.plan.deltas, x, layer.training)


def by_hand(model: PeftModel, x: Tensor) -> Tensor:
    """The base layer's output and each active pair's own."""
    layer = model.get_base_model().layer
    y = nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias)
    for name in model.active_adapters:
        A, B = (t[name].weight for t in (layer.lora_A, layer.lora_B))
        y = y + layer.scaling[name] * x @ A.T @ B.T
    return y


def batch() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(4, 3, 6, dtype=torch.float64)


@pytest.mark.parametrize("adapters", [1, 3])
def test_one_or_several_pairs_are_one_node(adapters: int) -> None:
    model = adapted(adapters)
    model.set_adapter([f"a{i}" for i in range(adapters)])
    y = whole(model, batch())
    assert y is not None
    torch.testing.assert_close(y, by_hand(model, batch()))
    mine = torch.autograd.grad(y.square().sum(), trained(model))
    theirs = torch.autograd.grad(by_hand(model, batch()).square().sum(), trained(model))
    for one, two in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, two)


def trained(model: PeftModel) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.register_forward_hook(lambda *_: None),
        lambda layer: layer.register_forward_pre_hook(lambda *_: None),
        lambda layer: layer.register_full_backward_hook(lambda *_: None),
        lambda layer: setattr(layer, "forward", lambda x: x[..., :5]),
        lambda layer: layer.weight.requires_grad_(),
        lambda layer: layer.bias.requires_grad_(),
        lambda layer: layer.float(),
    ],
    ids=["hook", "pre-hook", "backward hook", "own forward", "weight", "bias", "dtype"],
)
def test_a_base_layer_whose_call_is_more_than_its_product_is_called(change: Change) -> None:
    model = adapted()
    assert whole(model, batch()) is not None
    change(model.get_base_model().layer.base_layer)
    assert whole(model, batch()) is None


def test_hooks_of_the_base_layer_run() -> None:
    model, seen = adapted(), []
    layer = model.get_base_model().layer.base_layer
    layer.register_forward_hook(lambda module, args, y: seen.append(tuple(y.shape)) or 2 * y)
    base = nn.functional.linear(batch(), layer.weight, layer.bias)
    torch.testing.assert_close(model(batch()), by_hand(model, batch()) + base)
    assert seen == [(4, 3, 5)]


def test_under_autocast_the_operators_choose_the_dtype() -> None:
    model = adapted()
    with torch.autocast("cpu", torch.bfloat16):
        assert whole(model, batch()) is None


def test_dropout_of_one_adapter_is_in_the_node_and_of_several_is_not() -> None:
    model = adapted(2, lora_dropout=0.5).train()
    assert whole(model, batch()) is not None
    model.set_adapter(["a0", "a1"])
    assert whole(model, batch()) is None


def test_what_is_more_than_a_pair_runs_by_itself() -> None:
    assert whole(adapted(lora_bias=True), batch()) is None


def test_a_method_may_have_a_node_of_its_own_with_the_layer() -> None:
    model = adapted(use_dora=True)
    y = whole(model, batch())
    assert y is not None
    x, layer = batch(), model.get_base_model().layer
    (graft,) = layer.all_grafts()
    base = layer.base_layer(x)
    torch.testing.assert_close(y, graft.add(base.clone(), x, False, base))


def test_a_merged_adapter_leaves_the_node() -> None:
    model = adapted(2)
    model.set_adapter(["a0", "a1"])
    expected = model(batch())
    model.merge_adapter(["a1"])
    torch.testing.assert_close(model(batch()), expected)
