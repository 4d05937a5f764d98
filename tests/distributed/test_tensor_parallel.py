"""Tensor parallelism: adapters cut as their layers are give what whole ones give, for nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from multigraft import PeftModel
from tests.distributed import tensor_parallel_jobs as jobs
from tests.distributed.tiny import adapted, base, batch
from tests.distributed.world import World

ONE = [{"active": ["a"]}] * 3
SWITCHED = [{"active": ["a"]}, {"active": ["b"]}, {"active": ["a", "b"]}]
MIXED = [{"active": ["a", "b"], "rows": ["a", "b", "b", "__base__"]}] * 3
LAYERS, PER_LAYER = 2, 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("base")
    base(torch.float32, attention_bias=True).save_pretrained(place)
    return str(place)


def assert_same(found: jobs.Result, expected: jobs.Result) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for key, value in expected[1].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize(
    ("plan", "options"),
    [(ONE, {}), (SWITCHED, {}), (MIXED, {}), (ONE, {"use_rslora": True})],
    ids=["one", "switched", "mixed", "rslora"],
)
def test_parted_adapters_train_as_whole_ones_do(
    two: World, tmp_path: Path, folder: str, plan: list, options: dict
) -> None:
    names = ("a", "b")
    expected = jobs.whole_alone(folder, names, plan, options)
    for found, lies_well in two.run(jobs.trained, folder, names, plan, str(tmp_path), options):
        assert_same(found, expected)
        assert lies_well
    for name in names:
        saved = load_file(tmp_path / name / "adapter_model.safetensors")
        for key, value in expected[1].items():
            owner, _, own = key.partition("/")
            if owner == name:
                torch.testing.assert_close(saved[own], value, rtol=1e-4, atol=1e-5, msg=key)


def test_four_ranks_train_as_one_does(four: World, folder: str) -> None:
    expected = jobs.whole_alone(folder, ("a",), ONE, {})
    for found, lies_well in four.run(jobs.trained, folder, ("a",), ONE, None, {}):
        assert_same(found, expected)
        assert lies_well


def test_adapters_send_nothing_more_than_their_layers(two: World, folder: str) -> None:
    plain = two.run(jobs.collectives, folder, False)[0]
    forward, backward, reduce, inference = two.run(jobs.collectives, folder, True)[0]
    assert forward == plain[0]
    assert forward["all_reduce"] == 2 * LAYERS  # of rows; one more would be seen
    assert backward == plain[1]
    assert backward["all_reduce"] >= 5 * LAYERS  # of columns
    assert reduce == {"all_reduce": 1}
    assert inference == plain[3]


def test_parted_adapters_load_merge_and_serve_as_whole_ones_do(
    two: World, tmp_path: Path, folder: str
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    adapted(model).save_pretrained(tmp_path)
    bare = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ids = batch(0)
    with torch.no_grad():
        plain = bare(input_ids=ids).logits
        model = PeftModel.from_pretrained(bare, tmp_path)
        with_adapter = model(input_ids=ids).logits
    assert float((plain - with_adapter).abs().max()) > 0.01
    mixed = with_adapter.clone()
    mixed[1] = plain[1]
    expected = {
        **dict.fromkeys(["loaded", "merged", "unmerged", "again"], with_adapter),
        **dict.fromkeys(["disabled", "unloaded"], plain),
        "mixed": mixed,
    }
    for found in two.run(jobs.outputs, folder, str(tmp_path)):
        assert found.keys() == expected.keys()
        for name, logits in found.items():
            torch.testing.assert_close(logits, expected[name], rtol=1e-4, atol=1e-4, msg=name)


def test_plans_of_torch_train_and_go_on(two: World, tmp_path: Path) -> None:
    expected = jobs.plain_alone()
    for first, last, state, rest in two.run(jobs.with_parallelize_module, str(tmp_path / "s")):
        assert (first, last) == pytest.approx(expected[:2], rel=1e-5)
        assert rest == {"step": 2}
        for key, value in expected[2].items():
            torch.testing.assert_close(state[key], value, rtol=1e-3, atol=1e-4, msg=key)


def test_parts_and_rows_together(four: World) -> None:
    first, last, expected = jobs.plain_alone()
    for losses, state in four.run(jobs.with_rows):
        assert (losses[0], losses[-1]) == pytest.approx((first, last), rel=1e-5)
        for key, value in expected.items():
            torch.testing.assert_close(state[key], value, rtol=1e-3, atol=1e-4, msg=key)


def test_dropout_acts_on_whole_batches_and_is_refused_row_by_row(two: World, folder: str) -> None:
    (message, loss, without), (_, other, _) = two.run(jobs.dropped, folder)
    assert "cannot have of their own under tensor parallelism" in message
    assert loss == pytest.approx(other)
    assert abs(loss - without) > 1e-4


@pytest.mark.parametrize(
    ("how", "message"),
    [("dora", "is more than a low-rank pair there"), ("sequence", "sequence parallelism")],
)
def test_what_cannot_follow_is_refused_and_stays_whole(two: World, how: str, message: str) -> None:
    assert all(message in text for text in two.run(jobs.refused, how))
