"""Where adapters' tensors live: leaves, dictionaries by adapter, and names that hold any name."""

from __future__ import annotations

import copy
import pickle
from urllib.parse import unquote

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from multigraft.containers import AdapterDict, Leaf, escape, fetch, hold

AWKWARD = ["v1.0", "keys", "training", "forward", "_modules", "a%2Eb", "%", "T_destination"]


def leaf_with(value: float = 1.0) -> Leaf:
    leaf = Leaf()
    hold(leaf, "weight", nn.Parameter(torch.full((2, 3), value)))
    return leaf


def test_a_leaf_is_a_module_to_everything_torch_does_with_modules() -> None:
    leaf = leaf_with()
    seen: list[str] = []
    leaf.register_state_dict_pre_hook(lambda *_: seen.append("saved"))
    leaf.register_load_state_dict_post_hook(lambda *_: seen.append("loaded"))
    leaf.load_state_dict(leaf.state_dict())
    assert seen == ["saved", "loaded"]
    assert leaf.double().weight.dtype == torch.float64
    assert not leaf.requires_grad_(False).weight.requires_grad
    assert not leaf.eval().training


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copied_leaf_is_as_good_and_shares_nothing(way: object) -> None:
    leaf = leaf_with()
    twin = way(leaf)  # type: ignore[operator]
    with torch.no_grad():
        leaf.weight.zero_()
    assert bool((twin.weight == 1).all())
    assert list(twin.state_dict()) == ["weight"]


def test_hook_tables_of_two_leaves_are_their_own() -> None:
    one, other = Leaf(), Leaf()
    one._forward_hooks[0] = print
    assert not other._forward_hooks
    assert not Leaf()._forward_hooks


def test_a_leaf_lacks_what_a_module_lacks() -> None:
    with pytest.raises(AttributeError, match="Leaf"):
        _ = Leaf().weight


def test_nothing_takes_a_leaf_for_a_layer() -> None:
    assert type(leaf_with()).__mro__[1:] == nn.Module.__mro__
    assert repr(leaf_with()) == "Leaf(weight=(2, 3))"


@pytest.mark.parametrize("name", AWKWARD)
def test_any_name_is_a_key_and_comes_back_as_itself(name: str) -> None:
    group = AdapterDict()
    hold(group.leaf(name), "weight", nn.Parameter(torch.zeros(1)))
    assert group.keys() == [name]
    assert name in group
    assert group[name] is group.leaf(name)
    (key,) = group.state_dict()
    assert len(key.split(".")) == 2
    del group[name]
    assert (len(group), name in group) == (0, False)


@given(st.text(min_size=1, max_size=8), st.text(min_size=1, max_size=8))
def test_escaping_is_undone_by_unquoting_and_tells_names_apart(one: str, other: str) -> None:
    assert unquote(escape(one)) == one
    assert "." not in escape(one)
    assert not hasattr(nn.Module(), escape(one))
    assert (escape(one) == escape(other)) == (one == other)


def test_ordinary_names_are_not_escaped() -> None:
    assert [escape(n) for n in ("default", "my-adapter_2", "ä b")] == [
        "default",
        "my-adapter_2",
        "ä b",
    ]


def test_a_dictionary_holds_modules_parameters_and_buffers_in_order_of_addition() -> None:
    group = AdapterDict()
    tensor: dict[str, Tensor] = {"p": nn.Parameter(torch.ones(1)), "b": torch.zeros(1)}
    for name, value in tensor.items():
        hold(group, AdapterDict.key(name), value)
    leaf = group.leaf("m")
    assert dict(group.items()) == {**tensor, "m": leaf}
    assert [list(table) for table in (group._parameters, group._buffers)] == [["p"], ["b"]]


def test_an_absent_adapter_is_a_key_error_with_its_own_name() -> None:
    with pytest.raises(KeyError, match=r"v1\.0"):
        _ = AdapterDict()["v1.0"]


def test_tensors_are_found_after_conversions_replaced_them() -> None:
    leaf = Leaf()
    hold(leaf, "weight", nn.Parameter(torch.ones(1)))
    hold(leaf, "index", torch.ones(1))
    leaf.to(torch.float64)
    assert fetch(leaf, "weight") is leaf._parameters["weight"]
    assert {fetch(leaf, n).dtype for n in ("weight", "index")} == {torch.float64}


@pytest.mark.parametrize(
    ("label", "leaf", "key"),
    [
        ("", "", "a%2Eb"),
        ("", "weight", "a%2Eb.weight"),
        ("out", "", "a%2Eb.out"),
        ("out", "weight", "a%2Eb.out.weight"),
    ],
)
def test_a_tensor_stands_under_adapter_label_and_leaf(label: str, leaf: str, key: str) -> None:
    group = AdapterDict()
    owner, name = group.place("a.b", label, leaf)
    hold(owner, name, nn.Parameter(torch.ones(1)))
    assert list(group.state_dict()) == [key]


def test_a_leaf_made_in_evaluation_is_in_evaluation() -> None:
    assert not AdapterDict().eval().leaf("a").training
    assert AdapterDict().leaf("a").training
