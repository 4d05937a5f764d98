"""`bias="lora_only"` and `bias="all"`: copies of biases that belong to one adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from multigraft import get_peft_model, get_peft_model_state_dict
from tests.subject import Subject


@pytest.fixture
def subject() -> Subject:
    return Subject()


def adapted(subject: Subject, *names: str, bias: str = "lora_only") -> Any:
    """Adapters on the head, each of which trains biases."""
    model: Any = get_peft_model(subject.base, subject.config(["head"], bias=bias), names[0])
    for name in names[1:]:
        model.add_adapter(name, subject.config(["head"], bias=bias))
    return model


def copy_of(model: Any, adapter: str) -> nn.Parameter:
    parameter: nn.Parameter = model.get_base_model().head.bias_copy_bias[adapter]
    return parameter


def test_a_copy_starts_at_the_bases_values_and_changes_nothing(subject: Subject) -> None:
    model = adapted(subject, "a")
    assert torch.equal(copy_of(model, "a"), subject.pristine.head.bias)
    torch.testing.assert_close(model(subject.ids), subject.alone("a"))


def test_a_copy_that_starts_while_another_is_merged_starts_at_the_bases_own(
    subject: Subject,
) -> None:
    model = adapted(subject, "a")
    with torch.no_grad():
        copy_of(model, "a").add_(1)
    model.merge_adapter()
    model.add_adapter("b", subject.config(["head"], bias="lora_only"))
    assert torch.equal(copy_of(model, "b"), subject.pristine.head.bias)


def test_each_adapter_has_its_own_and_the_bases_bias_is_nobodys(subject: Subject) -> None:
    model = adapted(subject, "a", "b")
    with torch.no_grad():
        copy_of(model, "a").add_(1)
    first = model(subject.ids)
    model.set_adapter("b")
    torch.testing.assert_close(model(subject.ids), subject.alone("b"))
    model.set_adapter("a")
    torch.testing.assert_close(model(subject.ids), first)
    assert torch.equal(subject.base.head.base_layer.bias, subject.pristine.head.bias)


def test_two_active_copies_add_their_changes(subject: Subject) -> None:
    model = adapted(subject, "a", "b")
    with torch.no_grad():
        copy_of(model, "a").add_(1)
        copy_of(model, "b").add_(10)
    model.base_model.set_adapter(["a", "b"])
    both = model(subject.ids)
    with torch.no_grad():
        for name in ("a", "b"):
            copy_of(model, name).copy_(subject.pristine.head.bias)
    torch.testing.assert_close(both, model(subject.ids) + 11)


def test_gradients_go_to_the_copy_and_not_to_the_base(subject: Subject) -> None:
    model = adapted(subject, "a")
    model(subject.ids).sum().backward()
    assert copy_of(model, "a").grad is not None
    assert subject.base.head.base_layer.bias.grad is None


def test_merging_writes_the_copy_into_the_base_and_unmerging_takes_it_out(
    subject: Subject,
) -> None:
    model = adapted(subject, "a")
    with torch.no_grad():
        copy_of(model, "a").add_(1)
    expected = model(subject.ids)
    model.merge_adapter()
    torch.testing.assert_close(subject.base.head.base_layer.bias, copy_of(model, "a"))
    torch.testing.assert_close(model(subject.ids), expected)
    model.unmerge_adapter()
    assert torch.equal(subject.base.head.base_layer.bias, subject.pristine.head.bias)


def test_all_biases_are_those_of_layers_without_an_adapter_as_well(subject: Subject) -> None:
    model = adapted(subject, "a", bias="all")
    keys = {k for k in get_peft_model_state_dict(model, adapter_name="a") if k.endswith("bias")}
    expected = {n for n, _ in subject.pristine.named_parameters() if n.endswith("bias")}
    assert {
        k.removeprefix("base_model.model.").replace("base_layer.", "") for k in keys
    } == expected


def test_removal_leaves_no_trace(subject: Subject) -> None:
    adapted(subject, "a", "b", bias="all").unload()
    subject.assert_restored()
