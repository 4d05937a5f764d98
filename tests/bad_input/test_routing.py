"""Mixed batches whose rows cannot be served: refused before the forward, with what can be done."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from multigraft import LoraConfig, RoutingError, get_peft_model
from multigraft.methods.lora import LoRA
from tests.bad_input.refusals import IDS, model_of, refused
from tests.weaknesses import nets

ROUTES: list[tuple[Any, str]] = [
    (["a"], '`adapter_names` has 1 names for a batch of 2 rows. Give one per row, "__base__"'),
    (["a", "b", "a"], "`adapter_names` has 3 names for a batch of 2 rows"),
    ([], "`adapter_names` has 0 names for a batch of 2 rows"),
    ("ab", "`adapter_names` (='ab') must be a list with one name per row"),
    (3, "`adapter_names` (=3) must be a list with one name per row"),
    (["a", None], "`adapter_names` (=['a', None]) must be a list with one name per row"),
    (["a", 0], "`adapter_names` (=['a', 0]) must be a list with one name per row"),
    (["a", "z"], "no adapter is called `z`. There are: `a`, `b`."),
    (["A", "y"], "no adapter is called `A`, `y`. Nearest: `a`. There are: `a`, `b`."),
    (["__base_", "a"], "no adapter is called `__base_`."),
]


@pytest.mark.parametrize(("names", "message"), ROUTES, ids=lambda v: repr(v)[:24])
def test_rows_that_cannot_be_served_are_refused(names: Any, message: str) -> None:
    assert message in refused(RoutingError, model_of(), lambda m: m(IDS, adapter_names=names))


@pytest.mark.parametrize("merged", ["a", "b", "ab"])
@pytest.mark.parametrize("names", [["a", "b"], ["b", "__base__"], ["__base__", "__base__"]])
def test_rows_beside_a_merged_adapter_are_refused(merged: str, names: list[str]) -> None:
    message = refused(RoutingError, model_of(merged), lambda m: m(IDS, adapter_names=names))
    assert f"adapters {list(merged)} are merged into the base and would act on every row" in message
    assert "Call unmerge_adapter() first" in message


def test_rows_while_adapters_are_disabled_are_refused() -> None:
    model = model_of()
    with model.disable_adapter():
        message = refused(RoutingError, model, lambda m: m(IDS, adapter_names=["a", "b"]))
    assert "adapters are disabled. Leave disable_adapter() first" in message


def test_rows_without_a_batch_are_refused() -> None:
    message = refused(RoutingError, model_of(), lambda m: m(adapter_names=["a"]))
    assert "`adapter_names` needs a batch: no tensor was given as an argument" in message


def test_rows_of_a_deleted_adapter_are_refused() -> None:
    model = model_of()
    model.delete_adapter("b")
    message = refused(RoutingError, model, lambda m: m(IDS, adapter_names=["a", "b"]))
    assert "no adapter is called `b`. There are: `a`." in message


def test_a_method_that_cannot_serve_rows_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LoRA, "batchable", False)
    message = refused(RoutingError, model_of(), lambda m: m(IDS, adapter_names=["a", "b"]))
    assert "`a` is a LORA, which cannot serve single rows of a batch" in message
    assert "set_adapter()" in message


class Flat(nn.Module):
    """Folds rows and halves of rows into one axis, so that rows cannot be told apart inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, wide = x.shape
        return self.inner(x.reshape(rows * wide // 4, 4)).reshape(rows, wide)


def test_a_layer_that_cannot_tell_rows_apart_is_refused_and_the_route_is_gone() -> None:
    torch.manual_seed(0)
    model = get_peft_model(Flat().eval(), LoraConfig(r=2, target_modules=["inner"]), "a")
    nets.train_by_hand(model, "a")
    x = torch.randn(2, 12)
    output = model(x)
    with pytest.raises(
        RoutingError, match=r"inner: the input's first axis \(=6\) is not the batch"
    ):
        model(x, adapter_names=["a", "__base__"])
    assert model.roster.route is None
    assert torch.equal(model(x), output)
