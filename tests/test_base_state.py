"""The base's own tensors of an adapted model, beside PEFT's functions of the same names."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import Tensor, nn

import multigraft
from multigraft import CheckpointError, StateError
from multigraft import get_base_model_state_dict as read
from multigraft import set_base_model_state_dict as write

OPTIONS = {
    "r": 2,
    "target_modules": ["0", "1.inner"],
    "modules_to_save": ["head"],
    "init_lora_weights": False,
}


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out


def net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), Inner(), nn.BatchNorm1d(4))
    net.add_module("head", nn.Linear(4, 2))
    return net


def adapted(library: object) -> nn.Module:
    model: nn.Module = library.get_peft_model(net(), library.LoraConfig(**OPTIONS))  # type: ignore[attr-defined]
    return model


def test_it_is_the_state_of_the_model_before_as_with_peft() -> None:
    before, ours = net().state_dict(), read(adapted(multigraft))
    theirs = peft.get_base_model_state_dict(adapted(peft))
    assert list(ours) == list(before)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[key], before[key]) for key in before)


def test_it_can_be_had_of_a_model_that_was_adapted_in_place() -> None:
    base = net()
    multigraft.inject_adapter_in_model(multigraft.LoraConfig(**OPTIONS), base)
    assert list(read(base)) == list(net().state_dict())


def test_other_values_go_into_the_base_and_leave_the_adapter() -> None:
    new = {key: value + 1 for key, value in net().state_dict().items()}
    x, found = torch.randn(3, 4), []
    for library in (multigraft, peft):
        torch.manual_seed(1)
        model = adapted(library).eval()
        before = library.get_peft_model_state_dict(model)
        before = {key: value.clone() for key, value in before.items()}
        report = library.set_base_model_state_dict(model, new)
        assert report.missing_keys == report.unexpected_keys == []
        after = library.get_peft_model_state_dict(model)
        assert all(torch.equal(after[key], before[key]) for key in before)
        found.append((model(x), library.get_base_model_state_dict(model)))
    (y, state), (their_y, _) = found
    torch.testing.assert_close(y, their_y)
    assert all(torch.equal(state[key], new[key]) for key in new)


def test_names_that_do_not_fit_are_refused_before_anything_changes() -> None:
    model = adapted(multigraft)
    new = {key: value + 1 for key, value in net().state_dict().items()}
    new["other"] = new.pop("0.bias")
    with pytest.raises(CheckpointError, match=r"lacks `0.bias`; the base has no `other`"):
        write(model, new)
    with pytest.raises(RuntimeError):
        peft.set_base_model_state_dict(adapted(peft), new)
    assert torch.equal(read(model)["0.weight"], net().state_dict()["0.weight"])


def test_what_fits_is_taken_where_that_is_asked_for() -> None:
    model = adapted(multigraft)
    report = write(model, {"0.bias": torch.ones(4), "other": torch.ones(1)}, strict=False)
    theirs = peft.set_base_model_state_dict(
        adapted(peft), {"0.bias": torch.ones(4), "other": torch.ones(1)}, strict=False
    )
    assert report.unexpected_keys == theirs.unexpected_keys == ["other"]
    assert set(report.missing_keys) == set(theirs.missing_keys)
    assert torch.equal(read(model)["0.bias"], torch.ones(4))


def test_a_misshapen_tensor_is_refused_before_anything_changes() -> None:
    model = adapted(multigraft)
    new = {"0.bias": torch.ones(4), "0.weight": torch.ones(3, 3)}
    with pytest.raises(CheckpointError, match=r"of another shape are `0.base_layer.weight`"):
        write(model, new, strict=False)
    assert torch.equal(read(model)["0.bias"], net().state_dict()["0.bias"])


def test_a_merged_base_is_not_overwritten() -> None:
    model = adapted(multigraft)
    model.merge_adapter()  # type: ignore[operator]
    with pytest.raises(StateError, match="unmerge_adapter"):
        write(model, net().state_dict())
