"""Merging block of rows by block: what is written, and that a refused block undoes all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from multigraft import LoraConfig, get_peft_model, rowwise
from multigraft.bases import geometry_of
from multigraft.errors import MergeError
from multigraft.storage import slot_of

LAYERS = {
    "linear": lambda: nn.Linear(12, 20),
    "conv1d": lambda: Conv1D(20, 12),
    "embedding": lambda: nn.Embedding(20, 12),
}


@pytest.fixture(autouse=True)
def three_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole block and a rest, in both orientations."""
    monkeypatch.setattr(rowwise, "BLOCK", 3 * 20)


def adapted(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[kind]().to(dtype))
    config = LoraConfig(target_modules=["0"], r=4, init_lora_weights=False)
    peft_model = get_peft_model(model, config, "a")
    peft_model.add_adapter("b", config)
    peft_model.base_model.set_adapter(["a", "b"])
    return peft_model


def exact(peft_model: Any) -> Tensor:
    """The base's weight plus both updates, in float64."""
    layer = peft_model.get_base_model()[0]
    value = layer.base_layer.weight.detach().double()
    for (graft,) in layer.grafts.values():
        params = {name: tensor.detach().double() for name, tensor in graft.params.items()}
        value = value + graft.method.delta(params)
    return value


def merged(peft_model: Any) -> Tensor:
    peft_model.merge_adapter()
    return peft_model.get_base_model()[0].base_layer.weight.detach()


@pytest.mark.parametrize("kind", LAYERS)
def test_every_row_gets_every_update(kind: str) -> None:
    model = adapted(kind)
    wanted = exact(model)
    torch.testing.assert_close(merged(model).double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", LAYERS)
def test_bfloat16_is_rounded_once_however_many_updates(kind: str) -> None:
    model = adapted(kind, torch.bfloat16)
    wanted = exact(model).bfloat16()
    assert float((merged(model) != wanted).float().mean()) < 0.01


@pytest.mark.parametrize("kind", LAYERS)
def test_an_update_is_the_product_of_the_two_matrices(kind: str) -> None:
    layer = LAYERS[kind]()
    geometry = geometry_of(layer)
    assert geometry is not None
    shape_a, shape_b = geometry.factor_shapes(layer, 4)
    A, B = torch.randn(shape_a), torch.randn(shape_b)
    factors = geometry.matrices(layer, A, B)
    assert factors is not None
    torch.testing.assert_close(factors[0] @ factors[1], geometry.product(layer, A, B))


def test_a_second_merge_starts_from_what_the_first_kept() -> None:
    together, apart = adapted("linear", torch.bfloat16), adapted("linear", torch.bfloat16)
    apart.merge_adapter(["a"])
    assert torch.equal(merged(apart), merged(together))


def test_a_block_that_is_refused_leaves_no_other_one_written() -> None:
    model = adapted("linear")
    layer = model.get_base_model()[0]
    layer.lora_A["a"].weight.data.fill_(1e30)
    layer.lora_B["a"].weight.data[-1] = 1e30
    before = layer.base_layer.weight.detach().clone()
    with pytest.raises(MergeError, match="NaN or infinity"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)
    assert not layer.merged


def test_no_copy_of_the_whole_weight_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    copy = Tensor.copy_

    def watched(self: Tensor, *args: Any) -> Tensor:
        sizes.append(self.numel())
        return copy(self, *args)

    model = adapted("linear", torch.bfloat16)
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "copy_", watched)
        model.merge_adapter()
    assert max(sizes) == 5 * 12
    assert sum(sizes) == 2 * 20 * 12


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.float8_e4m3fn])
def test_formats_that_are_checked_or_computed_whole_go_the_other_way(dtype: torch.dtype) -> None:
    assert slot_of(nn.Linear(4, 4).to(dtype)).in_place() is None
