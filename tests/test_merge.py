"""Merging: what is written, what is kept, what is left alone. T10, T13, T23, T27: `weaknesses`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from multigraft import LoraConfig, MultigraftWarning, get_peft_model
from multigraft.layer import AdaptedLayer
from multigraft.merge import hide, merge, show, unmerge
from tests.laws import bits_of
from tests.oracle import Net as EveryKind
from tests.oracle import build, inputs, output
from tests.subject import Subject, layers

X = torch.arange(8).reshape(2, 4)


@pytest.fixture
def model() -> Any:
    """`a` on all linear layers, `b` on the head and the embedding; both are active."""
    subject = Subject()
    model = get_peft_model(subject.base, subject.config(), "a")
    model.add_adapter("b", subject.config(["head", "emb"]))
    model.base_model.set_adapter(["a", "b"])
    return model.eval()


def bits(model: Any) -> dict[str, bytes]:
    """Bits of the base's own tensors, by path."""
    return {
        name: bits_of(tensor)
        for name, tensor in model.get_base_model().state_dict().items()
        if "lora_" not in name
    }


def kept(model: Any) -> dict[str, list[str]]:
    return {x.path: list(x.kept) for x in layers(model.get_base_model()) if x.kept}


@pytest.mark.parametrize("options", [{}, {"bias": "all"}, {"modules_to_save": ["head", "norm"]}])
def test_every_kind_of_layer_and_tensor_gives_the_same_output_merged(
    options: dict[str, Any],
) -> None:
    names = ["emb", "lin0", "turned", "conv1", "conv3", "lin1"]
    model = get_peft_model(
        build(EveryKind).double(),
        LoraConfig(target_modules=names, r=2, init_lora_weights=False, **options),
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "bias_copy" in name:
                parameter.add_(0.1)
    before, batch = bits(model), inputs(model)
    expected = output(model, batch)
    model.merge_adapter()
    torch.testing.assert_close(output(model, batch), expected)
    torch.testing.assert_close(model.get_base_model()(**batch), expected)
    model.unmerge_adapter()
    assert bits(model) == before


def test_the_merged_weight_is_the_base_plus_every_update(model: Any) -> None:
    head = model.get_base_model().head
    own = head.base_layer.weight.detach().clone()
    updates = [head.scaling[n] * head.lora_B[n].weight @ head.lora_A[n].weight for n in ("a", "b")]
    model.merge_adapter()
    torch.testing.assert_close(head.base_layer.weight, own + sum(updates))


@pytest.mark.parametrize("order", [["a", "b"], ["b", "a"]])
def test_adapters_come_out_in_any_order_and_the_last_leaves_the_bits(
    model: Any, order: list[str]
) -> None:
    before = bits(model)
    for name in ("a", "b"):
        model.merge_adapter([name])
    for name in order:
        model.unmerge_adapter([name])
    assert bits(model) == before
    assert kept(model) == {}


def test_only_tensors_that_are_changed_are_kept_and_only_while_they_are(model: Any) -> None:
    model.merge_adapter(["b"])
    assert kept(model) == {"emb": ["weight"], "head": ["weight"]}
    model.unmerge_adapter()
    assert kept(model) == {}


def test_without_the_original_nothing_is_kept_and_values_come_back_up_to_rounding(
    model: Any,
) -> None:
    expected = {k: v.clone() for k, v in model.get_base_model().state_dict().items()}
    model.base_model.merge_adapter(keep_original=False)
    assert kept(model) == {}
    model.unmerge_adapter()
    for name, value in model.get_base_model().state_dict().items():
        torch.testing.assert_close(value, expected[name])


def test_parameters_keep_their_identity_and_memory_through_merging(model: Any) -> None:
    base = model.get_base_model()
    before = [(p, p.data_ptr()) for p in base.parameters()]
    for step in (model.merge_adapter, model.unmerge_adapter):
        step()
        now = list(base.parameters())
        assert all(p is q and p.data_ptr() == at for (p, at), q in zip(before, now, strict=True))


def test_a_layer_at_two_places_is_merged_once() -> None:
    base = nn.Module()
    base.one = base.other = nn.Linear(3, 3).double()
    model = get_peft_model(base, Subject().config(["one"]))
    layer = base.one
    expected = layer(torch.eye(3).double())
    model.merge_adapter()
    torch.testing.assert_close(layer.base_layer(torch.eye(3).double()), expected)


def test_merging_under_autocast_rounds_nothing_to_half_precision(model: Any) -> None:
    expected = model(X)
    with torch.autocast("cpu", torch.bfloat16):
        model.merge_adapter()
    torch.testing.assert_close(model(X), expected)


def test_an_inactive_adapter_can_be_merged_and_then_acts(model: Any) -> None:
    both = model(X)
    model.set_adapter("a")
    merge(model.roster, ["b"])
    torch.testing.assert_close(model(X), both)


def test_hidden_values_come_back_to_the_bit(model: Any) -> None:
    base = bits(model)
    model.merge_adapter()
    merged = bits(model)
    hidden = hide(model.roster)
    assert bits(model) == base
    show(hidden)
    assert bits(model) == merged != base


def test_with_nothing_left_to_merge_or_unmerge_a_warning_says_so(model: Any) -> None:
    with pytest.warns(MultigraftWarning, match="no adapter is merged"):
        unmerge(model.roster)
    model.merge_adapter()
    with pytest.warns(MultigraftWarning, match="no active adapter is left"):
        assert merge(model.roster) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once_from_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 32)).to(dtype)
    own = base[0].weight.detach().float()
    model = get_peft_model(base, LoraConfig(target_modules=["0"], r=4, init_lora_weights=False))
    layer: AdaptedLayer = base[0]
    A, B = (group["default"].weight.detach() for group in (layer.lora_A, layer.lora_B))
    assert A.dtype == torch.float32
    model.merge_adapter()
    exact = own + layer.scaling["default"] * B @ A
    assert within_one_rounding(layer.base_layer.weight, exact)


def within_one_rounding(found: Tensor, exact: Tensor) -> bool:
    """Whether half-precision values are the nearest to these, but for ties that float32 shifted."""
    return float((found != exact.to(found.dtype)).float().mean()) < 0.01


@pytest.mark.parametrize(
    "step",
    [
        lambda m: m.merge_and_unload(),
        lambda m: m.base_model.merge_and_unload(adapter_names=["b", "a"]),
        lambda m: (m.merge_adapter(["b"]), m.merge_and_unload())[1],
    ],
)
def test_the_merged_model_is_the_base_object_without_a_trace(
    model: Any, step: Callable[[Any], nn.Module]
) -> None:
    expected, base = model(X), model.get_base_model()
    found = step(model)
    assert found is base
    torch.testing.assert_close(found(X), expected)
    assert layers(found) == []
    assert "peft_config" not in vars(found)
    assert all("lora" not in key and "base_layer" not in key for key in found.state_dict())
