"""What is held out: seeded, and the same when lines are added."""

from __future__ import annotations

import pytest

from multigraft import ConfigError, DataError
from multigraft.train import Pair, Split, load_tokenizer
from multigraft.train.dataset import load_data, records_of
from multigraft.train.store import Store
from multigraft.train.tasks import task_of
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


def labelled(count):
    return [{"text": f"text {n}", "label": ("no", "yes")[n % 2]} for n in range(count)]


def test_a_tasks_examples_are_held_as_compactly_and_split_as_others(base_dir, tmp_path):
    data = str(write_lines(tmp_path / "d.jsonl", labelled(40)))
    tokenizer = load_tokenizer(base_dir)
    task = task_of("seq-cls")
    task = task.settled(records_of([data], task))
    loaded = load_data(data, tokenizer, 64, split=Split(0.3), task=task)
    assert isinstance(loaded.train.examples, Store)
    assert len(loaded.train.examples) + len(loaded.held_out.examples) == 40
    assert {c for e in loaded.train.examples for c in e.classes} == {0, 1}
    assert {type(r).__name__ for r in loaded.held_out.records} == {"Labelled"}


def test_labels_come_from_all_sources_and_bad_lines_are_passed_over(tmp_path):
    one = str(write_lines(tmp_path / "a.jsonl", labelled(2)))
    other = str(write_lines(tmp_path / "b.jsonl", [{"text": "t", "label": "maybe"}, "no"]))
    task = task_of("seq-cls")
    assert task.settled(records_of([one, other], task)).labels == ("maybe", "no", "yes")


def test_a_table_gives_labels_too(base_dir, tmp_path):
    path = tmp_path / "d.csv"
    path.write_text('text,label\nfine,1\npoor,0\n"so, so",1\n', encoding="utf-8")
    task = task_of("seq-cls")
    task = task.settled(records_of([str(path)], task))
    assert task.labels == ("0", "1")
    loaded = load_data(str(path), load_tokenizer(base_dir), 64, task=task)
    assert [e.classes for e in loaded.train.examples] == [[1], [0], [1]]


def test_lines_that_a_task_cannot_use_are_told_with_their_place(base_dir, tmp_path):
    rows = [*labelled(3), {"text": "t", "label": "maybe"}, {"text": "t"}, {"prompt": "p"}]
    data = str(write_lines(tmp_path / "d.jsonl", rows))
    task = task_of({"name": "seq-cls", "labels": ["no", "yes"], "problem": "single"})
    with pytest.raises(DataError) as told:
        load_data(data, load_tokenizer(base_dir), 64, task=task)
    lines = str(told.value).splitlines()
    assert lines[0] == "3 of 6 lines cannot be used:"
    assert lines[1].startswith(f"{data}:4: the label 'maybe' is unknown. Known: `no`, `yes`")
    assert lines[2].startswith(f"{data}:5: `label` is missing")
    assert lines[3].startswith(f"{data}:6: `text` is missing")
    loaded = load_data(data, load_tokenizer(base_dir), 64, task=task, on_bad_line="skip")
    assert len(loaded.train.examples) == 3
