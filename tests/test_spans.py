"""Spans: found as spelled out, and laid over what layers see."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import multigraft
from multigraft import LoraConfig, RoutingError
from multigraft.spans import Spans, last_spans, spans_of_forward

TOKEN = st.integers(0, 2)


def spelled_out(row: list[int], tokens: list[int]) -> int:
    starts = [i for i in range(len(row)) if row[i : i + len(tokens)] == tokens]
    return len(row) - starts[-1] if starts else 0


@given(
    st.integers(1, 6).flatmap(
        lambda n: st.lists(st.lists(TOKEN, min_size=n, max_size=n), min_size=1, max_size=4)
    ),
    st.lists(TOKEN, min_size=1, max_size=3),
)
def test_the_last_occurrence_is_found_in_every_row(
    rows: list[list[int]], tokens: list[int]
) -> None:
    found = last_spans(torch.tensor(rows), tokens)
    assert found.tolist() == [spelled_out(row, tokens) for row in rows]


def spans() -> Spans:
    return Spans({"a": torch.tensor([0, 1, 3, 9])}, tokens=3)


def test_a_mask_is_true_on_the_last_tokens_of_each_row() -> None:
    mask = spans().where("a", torch.zeros(4, 3, 5), "layer")
    assert mask.shape == (4, 3, 1)
    assert mask[..., 0].tolist() == [
        [False, False, False],
        [False, False, True],
        [True, True, True],
        [True, True, True],
    ]


@pytest.mark.parametrize(("tokens", "acting"), [(1, [0, 1, 1, 1]), (5, [0, 1, 3, 5])])
def test_a_layer_may_see_fewer_tokens_or_more(tokens: int, acting: list[int]) -> None:
    """A head that sees the last one alone; virtual tokens before the row's own."""
    mask = spans().where("a", torch.zeros(4, tokens, 5), "layer")
    assert mask.sum((1, 2)).tolist() == acting


def test_rows_and_tokens_may_be_one_axis() -> None:
    whole = spans().where("a", torch.zeros(4, 3, 5), "layer")
    assert torch.equal(spans().where("a", torch.zeros(12, 5), "layer"), whole.flatten(0, 1))
    last = spans().where("a", torch.zeros(4, 5), "layer")
    assert torch.equal(last, whole[:, -1])


@pytest.mark.parametrize("shape", [(5, 3, 5), (7, 5), (4, 2, 3, 5), (5,)])
def test_what_has_no_rows_of_tokens_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RoutingError, match=r"layer: `a` acts on some tokens .*`exclude_modules`"):
        spans().where("a", torch.zeros(shape), "layer")


def test_a_mask_is_made_once_for_all_layers_of_a_call() -> None:
    call = spans()
    first = call.where("a", torch.zeros(4, 3, 5), "layer")
    assert call.where("a", torch.zeros(4, 3, 8), "other") is first


def test_a_call_without_such_an_adapter_is_left_alone() -> None:
    model = multigraft.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"])
    )
    seen = []
    model.get_base_model()[0].register_forward_hook(  # type: ignore[index]
        lambda *_: seen.append(model.roster.spans)
    )
    model(torch.zeros(2, 4))
    assert seen == [None]


def test_spans_end_with_the_call_even_when_it_fails() -> None:
    config = LoraConfig(alora_invocation_tokens=[1])
    roster = SimpleNamespace(
        acting=lambda: ("a",),
        route=None,
        spans=None,
        configs={"a": config},
        root=torch.nn.Module(),
    )
    with pytest.raises(KeyError), spans_of_forward(roster, (torch.ones(1, 2).long(),), {}):  # type: ignore[arg-type]
        assert roster.spans is not None
        raise KeyError
    assert roster.spans is None
