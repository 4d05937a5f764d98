"""One adapter at one site: its tensors made, read where they are, and remembered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from multigraft import get_peft_model
from multigraft.bases import geometry_of
from multigraft.graft import Graft, grow
from multigraft.methods.contract import Method, TensorSpec
from multigraft.site import Site
from multigraft.storage import storage_of
from tests.subject import Subject

CPU = torch.device("cpu")


class Mixed(Method):
    """Every kind of tensor that a method may declare."""

    name = "MIXED"
    prefix = "mixed_"

    def tensors(self) -> dict[str, TensorSpec]:
        return {
            "mixed_a.weight": TensorSpec((2, 3)),
            "mixed_frozen": TensorSpec((2,), trainable=False),
            "mixed_index": TensorSpec((2,), buffer=True, dtype=torch.long, saved=False),
            "mixed_b": TensorSpec((4,), on_disk="mixed_b.on_disk"),
        }

    def reset(self, params: Mapping[str, Tensor]) -> None:
        for tensor in params.values():
            tensor.fill_(7)


def graft() -> Graft:
    layer = nn.Linear(3, 4)
    return Graft("a", Mixed(Site("lin", layer, geometry_of(layer), storage_of(layer)), None))


def grown(given: dict[str, Tensor] | None = None, dtype: torch.dtype = torch.float64) -> Any:
    with torch.no_grad():
        return grow(graft(), dtype, CPU, given)


def test_tensors_have_the_shape_dtype_and_kind_that_the_method_declares() -> None:
    made = grown()
    assert {n: (tuple(t.shape), t.dtype) for n, t in made.items()} == {
        "mixed_a.weight": ((2, 3), torch.float64),
        "mixed_frozen": ((2,), torch.float64),
        "mixed_index": ((2,), torch.long),
        "mixed_b": ((4,), torch.float64),
    }
    assert {n: t.requires_grad for n, t in made.items() if isinstance(t, nn.Parameter)} == {
        "mixed_a.weight": True,
        "mixed_frozen": False,
        "mixed_b": True,
    }


def test_what_is_not_given_is_reset_and_what_is_given_stays() -> None:
    made = grown({"mixed_b": torch.arange(4.0)})
    assert made["mixed_b"].tolist() == [0, 1, 2, 3]
    assert all(bool((t == 7).all()) for n, t in made.items() if n != "mixed_b")


def test_given_values_are_cast_to_what_is_declared() -> None:
    made = grown({"mixed_index": torch.ones(2), "mixed_b": torch.ones(4)}, torch.bfloat16)
    assert made["mixed_index"].dtype == torch.long
    assert made["mixed_b"].dtype == torch.bfloat16


@pytest.fixture
def held() -> Graft:
    """The graft of an adapter on a head, with its tensors registered."""
    subject = Subject()
    get_peft_model(subject.base, subject.config(["head"]))
    return subject.base.head.grafts["default"][0]


def test_tensors_are_read_where_they_are_registered_now(held: Graft) -> None:
    layer = held.site.layer
    owner, leaf = held.owners["lora_A.weight"]
    owner._parameters[leaf] = fresh = nn.Parameter(torch.zeros(2, 16))
    assert held.params["lora_A.weight"] is fresh
    assert layer is held.method.site.layer


def test_parameters_are_those_that_may_be_trained_whether_or_not_they_are(held: Graft) -> None:
    parameters = list(held.parameters())
    held.params["lora_A.weight"].requires_grad_(False)
    assert [id(p) for p in held.parameters()] == [id(p) for p in parameters]
    assert len(parameters) == 2


def test_what_is_saved_has_its_name_on_disk() -> None:
    made = graft()
    for name, tensor in grown().items():
        holder = nn.Module()
        holder.register_buffer("t", tensor)
        made.owners[name] = (holder, "t")
    assert [name for name, _ in made.saved()] == [
        "mixed_a.weight",
        "mixed_frozen",
        "mixed_b.on_disk",
    ]


def test_a_snapshot_stays_what_was_when_tensors_and_scaling_change(held: Graft) -> None:
    snapshot, before = held.snapshot(), {n: t.clone() for n, t in held.params.items()}
    scaling = held.method.scaling
    with torch.no_grad():
        for tensor in held.params.values():
            tensor.add_(1)
    held.method.scaling *= 2
    assert all(torch.equal(t, before[n]) for n, t in snapshot.params.items())
    assert snapshot.method.scaling == scaling
    assert not any(t.requires_grad for t in snapshot.params.values())
