"""LoRA: its numbers at one site, its initial values, and PEFT beside it."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import peft
import pytest
import torch
from torch import Tensor

from multigraft import LoraConfig, TargetError, get_peft_model
from multigraft.bases import geometry_of
from multigraft.graft import Graft, grow
from multigraft.methods.lora import LoRA
from multigraft.site import Site
from multigraft.storage import storage_of
from tests.methods.against_peft import LAYERS, AgreesWithPeft, Case
from tests.oracle import quiet

R = {"r": 4, "lora_alpha": 6}
KINDS = ["linear", "conv1d_transposed", "embedding", "conv1d", "conv2d", "conv3d"]


class TestLora(AgreesWithPeft):
    kind = "LoraConfig"
    cases: ClassVar = {
        **{name: Case(name, R) for name in LAYERS},
        "rslora": Case("linear", R | {"use_rslora": True}),
        "a bias of B": Case("linear", R | {"lora_bias": True}),
        "a bias of B on Conv1D": Case("conv1d_transposed", R | {"lora_bias": True}),
        "a bias of B on a convolution": Case("conv1d", R | {"lora_bias": True}),
        "patterns": Case("linear", R | {"rank_pattern": {"layer": 3}, "alpha_pattern": {"l.*": 5}}),
    }


def site(kind: str = "linear", path: str = "layer") -> Site:
    torch.manual_seed(0)
    layer = LAYERS[kind]().layer.requires_grad_(False)
    return Site(path, layer, geometry_of(layer), storage_of(layer))


def lora(kind: str = "linear", path: str = "layer", **options: Any) -> LoRA:
    return LoRA(site(kind, path), LoraConfig(**options))


def fresh(method: LoRA, seed: int = 0) -> dict[str, Tensor]:
    """The method's tensors with their initial values."""
    torch.manual_seed(seed)
    with torch.no_grad():
        return grow(Graft("a", method), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    ("options", "scaling"),
    [
        ({}, 1.0),
        ({"r": 4, "lora_alpha": 6}, 1.5),
        ({"r": 4, "lora_alpha": 6, "use_rslora": True}, 3.0),
        ({"r": 4, "lora_alpha": 0}, 0.0),
        ({"r": 4, "lora_alpha": -2}, -0.5),
    ],
)
def test_the_scaling_is_alpha_over_the_rank_or_over_its_root(
    options: dict[str, Any], scaling: float
) -> None:
    assert lora(**options).scaling == scaling


def test_patterns_set_rank_and_alpha_and_so_the_scaling_at_their_sites() -> None:
    options = {"r": 8, "lora_alpha": 8, "rank_pattern": {"q": 2}, "alpha_pattern": {"a.q": 10}}
    inside, beside = lora(path="a.q", **options), lora(path="a.v", **options)
    assert (inside.rank, inside.alpha, inside.scaling) == (2, 10, 5.0)
    assert (beside.rank, beside.alpha, beside.scaling) == (8, 8, 1.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", [True, "gaussian"])
def test_a_new_adapter_changes_nothing(kind: str, init: bool | str) -> None:
    method = lora(kind, init_lora_weights=init)
    assert float(method.delta(fresh(method)).abs().max()) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_random_start_changes_something(kind: str) -> None:
    method = lora(kind, init_lora_weights=False)
    assert float(method.delta(fresh(method)).abs().max()) > 0


def moments(values: list[Tensor]) -> tuple[float, float]:
    """Standard deviation and largest magnitude of many draws."""
    together = torch.cat([v.detach().flatten() for v in values])
    return float(together.std()), float(together.abs().max())


@pytest.mark.parametrize("init", [True, False, "gaussian"])
@pytest.mark.parametrize("kind", KINDS)
def test_initial_values_are_distributed_as_pefts(kind: str, init: bool | str) -> None:
    ours: dict[str, list[Tensor]] = {}
    theirs: dict[str, list[Tensor]] = {}
    for seed in range(30):
        for name, tensor in fresh(lora(kind, r=4, init_lora_weights=init), seed).items():
            ours.setdefault(name.split(".")[0], []).append(tensor)
        torch.manual_seed(seed)
        config = peft.LoraConfig(target_modules=["layer"], r=4, init_lora_weights=init)
        with quiet():
            model = peft.get_peft_model(LAYERS[kind](), config)
        for name, tensor in model.named_parameters():
            if "lora_" in name:
                theirs.setdefault(name.split(".")[3], []).append(tensor)
    assert ours.keys() == theirs.keys()
    for name in ours:
        (spread, largest), (their_spread, their_largest) = (
            moments(ours[name]),
            moments(theirs[name]),
        )
        assert spread == pytest.approx(their_spread, rel=0.1)
        assert largest == pytest.approx(their_largest, rel=0.25)


def test_a_kaiming_start_is_bounded_by_the_root_of_the_fan_in() -> None:
    A = fresh(lora("conv2d"))["lora_A.weight"]
    bound = 1 / math.sqrt(A[0].numel())
    assert bound * 0.9 < float(A.detach().abs().max()) <= bound


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_applied_is_what_is_added_to_the_weight(kind: str) -> None:
    method = lora(kind, r=4, init_lora_weights=False)
    params = fresh(method)
    x = LAYERS[kind]().batch()
    x = x.float() if x.is_floating_point() else x
    layer = method.site.layer
    expected = method.geometry.run(layer, x, method.delta(params))
    torch.testing.assert_close(method.apply(params, x), expected, atol=1e-6, rtol=1e-5)
    y = layer(x)
    torch.testing.assert_close(method.add(params, y, x, False), y + expected, atol=1e-6, rtol=1e-5)
    W = layer.weight
    torch.testing.assert_close(method.add_delta(params, W), W + method.delta(params))


def test_a_bias_of_b_is_scaled_as_the_product_is() -> None:
    method = lora(r=2, lora_alpha=6, lora_bias=True)
    params = {name: torch.ones_like(tensor) for name, tensor in fresh(method).items()}
    assert method.delta_bias(params).tolist() == [3.0] * 8  # type: ignore[union-attr]
    zero = torch.zeros(1, 12)
    torch.testing.assert_close(method.apply(params, zero), torch.full((1, 8), 3.0))


def test_without_a_bias_of_b_there_is_no_change_of_the_bias() -> None:
    method = lora()
    assert method.delta_bias(fresh(method)) is None


def test_a_bias_of_b_on_an_embedding_is_refused_by_both_libraries() -> None:
    options = {"target_modules": ["layer"], "lora_bias": True}
    with pytest.raises(TargetError, match=r"cannot adapt layer: `lora_bias`.*embedding"):
        get_peft_model(LAYERS["embedding"](), LoraConfig(**options))
    with quiet(), pytest.raises(ValueError, match="lora_bias"):
        peft.get_peft_model(LAYERS["embedding"](), peft.LoraConfig(**options))


def test_dropout_keeps_the_expectation_and_is_none_on_lookups() -> None:
    method = lora(r=4, init_lora_weights=False, lora_dropout=0.5)
    params, x, y = fresh(method), torch.randn(1, 12), torch.zeros(1, 8)
    torch.manual_seed(0)
    mean = sum(method.add(params, y, x, True) for _ in range(4000)) / 4000
    torch.testing.assert_close(mean, method.add(params, y, x, False), atol=0.05, rtol=0)
    assert lora("embedding", lora_dropout=0.5).dropout == 0
