"""What is held out: seeded, and the same when lines are added."""

from __future__ import annotations

import pytest

from multigraft import ConfigError, DataError
from multigraft.train import Pair, Split, load_tokenizer
from multigraft.train.dataset import load_data
from tests.tiny_base import pair_rows, write_lines


def held(records, seed=0):
    return {r.prompt for r in records if Split(0.2, seed).holds_out(r)}


def test_a_split_is_seeded_and_stays_when_lines_are_added():
    records = [Pair(f"p{n}", "c", n) for n in range(1000)]
    moved = [Pair(r.prompt, r.completion, 5000 - r.line) for r in reversed(records[:500])]
    assert held(moved) == held(records[:500]) == held(records) & {r.prompt for r in moved}
    assert held(records) != held(records, seed=1)
    assert 150 < len(held(records)) < 250


def test_the_two_sides_share_nothing(base_dir, tmp_path):
    data = str(write_lines(tmp_path / "d.jsonl", pair_rows()))
    loaded = load_data(data, load_tokenizer(base_dir), 64, split=Split(0.4))
    assert len(loaded.train.examples) + len(loaded.held_out.examples) == len(pair_rows())
    assert len(loaded.held_out.records) == len(loaded.held_out.examples) > 0


def test_a_side_that_is_empty_is_refused(base_dir, tmp_path):
    data = str(write_lines(tmp_path / "d.jsonl", pair_rows()[:1]))
    with pytest.raises(DataError, match="is left for"):
        load_data(data, load_tokenizer(base_dir), 64, split=Split(0.5))


@pytest.mark.parametrize("share", [0, 1, -0.5, float("nan")])
def test_a_share_is_between_0_and_1(share):
    with pytest.raises(ConfigError, match="eval_split"):
        Split(share)
