"""Data parallel, ours and torch's own: what N processes make is what one makes."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import replica_jobs as jobs
from tests.distributed.world import World

ONE = [{"active": ["a"]}] * 3
BOTH = [{"active": ["a", "b"]}] * 3
SWITCHED = [{"active": ["a"]}, {"active": ["b"]}, {"active": ["a"]}, {"active": ["b"]}]
EVEN = [{"active": ["a", "b"], "rows": ["a", "b", "b", "a"]}] * 3
UNEVEN = [{"active": ["a", "b"], "rows": ["a", "a", "b", "__base__"]}] * 3
"""The first rank has no row of `b`, the second none of `a`."""
IDLE = [{"active": ["a", "b"], "rows": ["a", "a", "__base__", "__base__"]}] * 3
"""The second rank trains nothing, and no rank `b`."""


def assert_same(found: jobs.Result, expected: jobs.Result) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1].keys() == expected[1].keys()
    for key, value in expected[1].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize(
    "plan",
    [ONE, BOTH, SWITCHED, EVEN, UNEVEN, IDLE],
    ids=["one", "both", "switched", "even", "uneven", "idle"],
)
def test_replicas_train_as_one_process_does(two: World, plan: list) -> None:
    expected = jobs.alone(("a", "b"), plan)
    for found in two.run(jobs.with_replicas, ("a", "b"), plan):
        assert_same(found, expected)


def test_four_ranks_train_as_one_process_does(four: World) -> None:
    plan = [{"active": ["a", "b"], "rows": ["a", "b", "__base__", "b"]}] * 2
    expected = jobs.alone(("a", "b"), plan)
    for found in four.run(jobs.with_replicas, ("a", "b"), plan):
        assert_same(found, expected)


def test_training_changes_the_adapters(two: World) -> None:
    before = jobs.alone(("a", "b"), [])[1]
    after = two.run(jobs.with_replicas, ("a", "b"), UNEVEN)[0][1]
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert {key.partition("/")[0] for key in moved} == {"a", "b"}


@pytest.mark.parametrize("plan", [ONE, BOTH, EVEN], ids=["one", "both", "even"])
def test_ddp_trains_active_adapters_beside_inactive_ones(two: World, plan: list) -> None:
    expected = jobs.alone(("a", "b", "idle"), plan)
    found = two.run(jobs.with_ddp, ("a", "b", "idle"), plan)
    mean = [sum(losses) / 2 for losses in zip(*(f[0] for f in found), strict=True)]
    for _, state in found:
        assert_same((mean, state), expected)


def test_ddp_takes_ranks_without_rows_of_an_adapter_when_it_looks_for_unused(two: World) -> None:
    expected = jobs.alone(("a", "b"), UNEVEN)
    for _, state in two.run(jobs.with_ddp, ("a", "b"), UNEVEN, True):
        assert_same(([], state), ([], expected[1]))


def test_an_adapter_that_ddp_does_not_know_is_warned_of(two: World) -> None:
    for late, anew in two.run(jobs.ddp_then_switch):
        assert len(late) == 1
        assert "adapters ['b'] begin to train" in late[0]
        assert "Replicas" in late[0]
        assert not anew


def test_adapters_alone_get_gradients(two: World) -> None:
    for names in two.run(jobs.with_frozen_base):
        assert names
        assert all(".a." in name for name in names)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("base", "do not all hold the same base model"),
        ("adapters", "do not all have the same adapters"),
        ("active", "do not all train the same parameters"),
    ],
)
def test_ranks_that_differ_are_refused(two: World, how: str, message: str) -> None:
    assert all(message in text for text in two.run(jobs.refused, how))


def test_one_rank_saves(two: World, tmp_path) -> None:
    names = ["adapter_config.json", "adapter_model.safetensors"]
    expected = sorted(["README.md", *names, *(f"b/{name}" for name in names)])
    assert two.run(jobs.saved, str(tmp_path)) == [expected, expected]


def test_an_adapter_that_is_added_later_gets_one_ranks_values(two: World) -> None:
    (before, after), (other_before, other_after) = two.run(jobs.added_later)
    assert before != other_before
    assert after == other_after == before
