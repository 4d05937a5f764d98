"""The adapted layer: one base, everyone beside it, and a plan made beforehand."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from multigraft import AdaptedLayer, get_peft_model
from multigraft.graft import Graft
from multigraft.layer import Plan
from multigraft.routing import BASE, Route
from tests.subject import Subject, layers


@pytest.fixture
def subject() -> Subject:
    """`a` and `b` on the head; `a` is active."""
    subject = Subject()
    model = get_peft_model(subject.base, subject.config(["head"]), "a")
    model.add_adapter("b", subject.config(["head"]))
    return subject


def head(subject: Subject) -> AdaptedLayer:
    (layer,) = layers(subject.base)
    return layer


def update(layer: AdaptedLayer, adapter: str, x: Tensor) -> Tensor:
    """What an adapter adds, by its tensors."""
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return layer.scaling[adapter] * x @ A.T @ B.T


def counted(layer: AdaptedLayer) -> list[int]:
    """How often the base layer ran, as a list that grows."""
    calls: list[int] = []
    layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    return calls


X = torch.linspace(-1, 1, 48, dtype=torch.float64).reshape(3, 16)


def test_without_an_acting_adapter_the_output_is_the_base_layers_own_object(
    subject: Subject,
) -> None:
    layer, seen = head(subject), []
    layer.base_layer.register_forward_hook(lambda _m, _x, y: seen.append(y))
    layer.roster.set_active([])
    assert layer(X) is seen[0]


def test_active_adapters_add_their_updates_and_the_base_runs_once(subject: Subject) -> None:
    layer = head(subject)
    layer.roster.set_active(["a", "b"])
    calls = counted(layer)
    expected = layer.base_layer(X) + update(layer, "a", X) + update(layer, "b", X)
    torch.testing.assert_close(layer(X), expected)
    assert len(calls) == 2  # once here, once there


def test_a_forward_changes_no_state(subject: Subject) -> None:
    layer = head(subject)
    before = dict(vars(layer)), {k: v.clone() for k, v in layer.state_dict().items()}
    layer(X)
    assert dict(vars(layer)) == before[0]
    assert all(torch.equal(v, before[1][k]) for k, v in layer.state_dict().items())


def test_a_forward_reads_the_plan_and_not_who_is_active(subject: Subject) -> None:
    layer = head(subject)
    expected = layer(X)
    layer.roster.active = ("b",)
    assert torch.equal(layer(X), expected)
    layer.replan()
    torch.testing.assert_close(layer(X), layer.base_layer(X) + update(layer, "b", X))


def test_an_input_may_be_given_by_its_name(subject: Subject) -> None:
    layer = head(subject)
    assert torch.equal(layer(input=X), layer(X))
    with pytest.raises(TypeError, match=r"head: the layer's first argument \(`input`\) is missing"):
        layer(x=X)


def test_hooks_on_the_base_layer_and_on_the_wrapper_run(subject: Subject) -> None:
    layer, order = head(subject), []
    layer.base_layer.register_forward_pre_hook(lambda *_: order.append("base"))
    layer.register_forward_hook(lambda *_: order.append("layer"))
    subject.base(subject.ids)
    assert order == ["base", "layer"]


def test_gradients_reach_the_acting_adapter_alone(subject: Subject) -> None:
    layer = head(subject)
    layer.roster.set_requires_grad(["a", "b"], True)
    layer(X).sum().backward()
    with_gradient = {n for n, p in layer.named_parameters() if p.grad is not None}
    assert with_gradient == {"lora_A.a.weight", "lora_B.a.weight"}


def test_dropout_acts_on_the_adapters_input_in_training_alone(subject: Subject) -> None:
    model = get_peft_model(subject.base, subject.config(["head"], lora_dropout=0.5), "c")
    layer = head(subject)
    plain = layer.base_layer(X) + update(layer, "c", X)
    model.eval()
    torch.testing.assert_close(layer(X), plain)
    model.train()
    torch.manual_seed(1)
    found = layer(X)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(X, 0.5)
    torch.testing.assert_close(found, layer.base_layer(X) + update(layer, "c", dropped))


def test_rows_of_a_batch_use_their_own_adapters_and_the_base_runs_once(subject: Subject) -> None:
    layer = head(subject)
    expected = torch.stack(
        [
            layer.base_layer(X[0]) + update(layer, "b", X[0]),
            layer.base_layer(X[1]),
            layer.base_layer(X[2]) + update(layer, "a", X[2]),
        ]
    )
    calls = counted(layer)
    with layer.roster.routed(Route(["b", BASE, "a"])):
        torch.testing.assert_close(layer(X), expected)
    assert len(calls) == 1


def test_removing_the_last_adapter_leaves_no_container(subject: Subject) -> None:
    layer = head(subject)
    layer.remove("a")
    assert sorted(layer._modules) == ["base_layer", "lora_A", "lora_B"]
    assert [group.keys() for group in (layer.lora_A, layer.lora_B)] == [["b"], ["b"]]
    layer.remove("b")
    assert list(layer._modules) == ["base_layer"]
    assert layer.grafts == {}


def test_a_new_wrapper_is_in_its_layers_mode_and_so_are_its_adapters(subject: Subject) -> None:
    fresh = Subject()
    fresh.base.eval()
    get_peft_model(fresh.base, fresh.config(["head"]))
    assert not any(module.training for module in fresh.base.modules())
    assert head(subject).training


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copied_model_has_adapters_of_its_own(
    subject: Subject, way: Callable[[nn.Module], Any]
) -> None:
    twin = way(subject.base)
    assert torch.equal(twin(subject.ids), subject.base(subject.ids))
    expected = subject.base(subject.ids)
    with torch.no_grad():
        twin.head.lora_B["a"].weight.zero_()
    assert torch.equal(subject.base(subject.ids), expected)
    assert not torch.equal(twin(subject.ids), expected)
    twin.head.roster.set_active(["b"])
    assert torch.equal(subject.base(subject.ids), expected)


def graft(kind: str, adapter: str = "a") -> Any:
    """A graft of this nature, and nothing else."""
    return _Stub(adapter, kind)


class _Stub(Graft):
    __slots__ = ("kind",)

    def __init__(self, adapter: str, kind: str) -> None:
        self.adapter = adapter
        self.kind = kind

    @property
    def method(self) -> Any:
        return type(
            "Method",
            (),
            {"kind": self.kind, "needs_base": self.kind == "additive", "by_token": False},
        )

    @property
    def site(self) -> Any:
        return type("Site", (), {"rebinds": False})


def test_a_plan_sorts_adapters_by_their_nature() -> None:
    a, m, r = graft("additive"), graft("map"), graft("replace")
    plan = Plan.of([a, m, r])
    assert (plan.inputs, plan.stand_in, plan.outputs, plan.deltas) == ((m,), r, (m,), (a,))
    assert not plan.is_additive
    assert plan.needs_base


def test_the_plan_of_nobody_is_the_base_layer() -> None:
    assert Plan.of([]) == Plan()
    assert Plan().is_additive
    assert not Plan().needs_base
