"""A site: the base's own tensor, and where and in what dtype adapters are made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from multigraft import get_peft_model
from multigraft.bases import geometry_of
from multigraft.site import Site
from multigraft.storage import storage_of
from tests.subject import Subject


def site(layer: nn.Module, parameter: str | None = None, **more: Any) -> Site:
    storage = storage_of(layer, parameter or "weight")
    return Site("a.b.lin", layer, geometry_of(layer), storage, parameter, **more)


def test_the_weight_is_the_bases_own_also_while_adapters_are_merged() -> None:
    subject = Subject()
    model = get_peft_model(subject.base, subject.config(["head"]))
    own = subject.base.head.grafts["default"][0].site
    before = own.weight().clone()
    model.merge_adapter()
    assert torch.equal(own.weight(), before)
    assert not torch.equal(own.layer.weight, before)


def test_a_site_of_a_parameter_is_called_by_it() -> None:
    layer = nn.Linear(3, 4)
    assert (str(site(layer)), site(layer).tensor_name) == ("a.b.lin", "weight")
    assert (str(site(layer, "bias")), site(layer, "bias").tensor_name) == ("a.b.lin.bias", "bias")
    assert site(layer, "bias").weight().shape == (4,)


def test_a_site_inside_its_host_is_named_from_the_host() -> None:
    inside = site(nn.Linear(2, 2), inner="lin")
    assert (inside.host_path, inside.key, inside.key_of("bias")) == (
        "a.b",
        "lin.weight",
        "lin.bias",
    )
    assert (site(nn.Linear(2, 2)).host_path, site(nn.Linear(2, 2)).key) == ("a.b.lin", "weight")


def test_adapters_act_beside_an_output_or_by_changing_what_is_read() -> None:
    layer = nn.Linear(2, 2)
    assert not site(layer).rebinds
    assert site(layer, "bias").rebinds
    assert site(layer, inner="lin").rebinds


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_adapters_take_the_bases_floating_dtype(dtype: torch.dtype) -> None:
    assert site(nn.Linear(2, 2).to(dtype)).dtype == dtype
    assert site(nn.Embedding(2, 2).to(dtype)).dtype == dtype


def test_adapters_of_a_base_that_is_not_computed_in_take_a_dtype_that_is() -> None:
    layer = nn.Linear(2, 2).to(torch.float8_e4m3fn)
    assert site(layer).dtype == torch.float32


def test_adapters_are_made_where_the_layers_tensors_are() -> None:
    assert site(nn.Linear(2, 2, device="meta")).device.type == "meta"
    assert site(nn.Linear(2, 2)).device.type == "cpu"
    only_buffers = nn.BatchNorm1d(2, affine=False, device="meta")
    assert site(only_buffers).device.type == "meta"
    inside = nn.Sequential(nn.Linear(2, 2, device="meta"))
    assert site(inside).device.type == "meta"
    assert site(nn.ReLU()).device.type == "cpu"
