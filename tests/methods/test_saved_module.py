"""`modules_to_save`: whole copies; beside LoRA on the same layer: `weaknesses/test_t01`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from multigraft import LoraConfig, TargetError, get_peft_model, get_peft_model_state_dict


class Net(nn.Module):
    """A module of every sort to save."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.idle = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.norm(self.lin(x)))


def adapted(*saved: str, base: nn.Module | None = None) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["lin"], modules_to_save=list(saved), r=1)
    return get_peft_model(base or Net(), config)


X = torch.linspace(-1, 1, 24).reshape(6, 4)


@pytest.mark.parametrize("name", ["norm", "block", "block.2"])
def test_a_copy_stands_in_for_its_module_and_starts_alike(name: str) -> None:
    model = adapted(name).eval()
    torch.manual_seed(0)
    expected = Net().eval()(X)
    torch.testing.assert_close(model(X), expected)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "modules_to_save" in key:
                parameter.add_(1)
    assert not torch.allclose(model(X), expected)
    with model.disable_adapter():
        torch.testing.assert_close(model(X), expected)


def test_a_copy_trains_whole_whatever_of_the_base_was_frozen() -> None:
    base = Net().requires_grad_(False)
    model = adapted("norm", base=base)
    model(X).sum().backward()
    copy = base.norm.modules_to_save["default"]
    assert all(p.requires_grad and p.grad is not None for p in copy.parameters())
    assert all(p.grad is None for p in base.norm.base_layer.parameters())


def test_buffers_are_copied_saved_and_updated_apart_from_the_bases() -> None:
    model = adapted("norm")
    base = model.get_base_model().norm.base_layer
    model.train()(X)
    keys = {k.rpartition(".")[2] for k in get_peft_model_state_dict(model) if ".norm." in k}
    assert keys == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert int(model.get_base_model().norm.modules_to_save["default"].num_batches_tracked) == 1
    assert int(base.num_batches_tracked) == 0


def test_a_copy_made_while_another_adapter_is_merged_starts_at_the_bases_own() -> None:
    config = LoraConfig(target_modules=["0"], r=1, init_lora_weights=False)
    model = get_peft_model(Net(), config)
    own = model.get_base_model().block[0].base_layer.weight.detach().clone()
    model.merge_adapter()
    model.add_adapter("b", LoraConfig(target_modules=["lin"], modules_to_save=["block"], r=1))
    copy = model.get_base_model().block[0].modules_to_save["b"]
    assert torch.equal(copy.weight, own)


def test_a_module_without_tensors_is_refused() -> None:
    with pytest.raises(TargetError, match="idle"):
        adapted("idle")


def test_hooks_and_mode_of_the_base_module_are_the_copys() -> None:
    base, seen = Net().eval(), []
    base.norm.register_forward_hook(lambda *_: seen.append(1))
    model = adapted("norm", base=base)
    assert not base.norm.modules_to_save["default"].training
    model(X)
    assert seen == [1]
