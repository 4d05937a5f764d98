"""Formats of labels, tags, relations and preferences: what each makes of a row, and refuses."""

from __future__ import annotations

import json
import re

import pytest

from multigraft import UnsupportedError
from multigraft.train.data import read
from multigraft.train.formats import check_format, read_row
from multigraft.train.records import (
    LANGUAGE,
    Chat,
    Labelled,
    Pair,
    Preference,
    Refusal,
    Related,
    Tagged,
    Text,
)
from tests.tiny_base import write_lines

ASK = {"role": "user", "content": "p"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in "gb")
CHATS = Preference(Chat((ASK, GOOD), 7, None, 1), Chat((ASK, BAD), 7, None, 1), 7)
PAIRS = Preference(Pair("p", "g", 7), Pair("p", "b", 7), 7)
SPLIT = Preference(Pair("Q: x\nA:", " good", 7), Pair("Q: x\nA:", " gone", 7), 7)


@pytest.mark.parametrize(
    ("row", "record"),
    [
        ({"text": "t", "label": "a"}, Labelled("t", "a", None, 7)),
        ({"sentence": "t", "label": 3}, Labelled("t", 3, None, 7)),
        ({"text": "t", "label": True}, Labelled("t", "true", None, 7)),
        ({"text": "t", "labels": ["a", "b"]}, Labelled("t", ("a", "b"), None, 7)),
        ({"text": "t", "labels": '["a"]'}, Labelled("t", ("a",), None, 7)),
        ({"text": "t", "text_pair": "u", "label": 0.5}, Labelled("t", 0.5, "u", 7)),
        ({"premise": "t", "hypothesis": "u", "label": 1}, Labelled("t", 1, "u", 7)),
        ({"tokens": ["a", "b"], "tags": ["O", "X"]}, Tagged(("a", "b"), ("O", "X"), 7)),
        ({"tokens": '["a"]', "ner_tags": [3]}, Tagged(("a",), (3,), 7)),
        ({"source": "s", "target": "t"}, Pair("s", "t", 7)),
        ({"dialogue": "s", "summary": "t"}, Pair("s", "t", 7)),
        ({"anchor": "a", "positive": "p"}, Related("a", "p", None, None, 7)),
        ({"query": "a", "positive": "p", "negative": "n"}, Related("a", "p", "n", None, 7)),
        ({"sentence1": "a", "sentence2": "b", "score": "0.5"}, Related("a", "b", None, 0.5, 7)),
        ({"prompt": "p", "chosen": "g", "rejected": "b"}, PAIRS),
        ({"prompt": "p", "chosen": [GOOD], "rejected": [BAD]}, CHATS),
        ({"prompt": "p", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, CHATS),
        ({"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}, CHATS),
        ({"prompt": [ASK], "chosen": "g", "rejected": "b"}, CHATS),
        ({"prompt": [ASK], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, CHATS),
        ({"chosen": json.dumps([ASK, GOOD]), "rejected": json.dumps([ASK, BAD])}, CHATS),
        ({"chosen": "Q: x\nA: good", "rejected": "Q: x\nA: gone"}, SPLIT),
        ({"prompt": "p", "chosen": "[1]", "rejected": "b"}, None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_row_is_known_by_its_keys(row, record):
    kinds = (type(record),) if record is not None else (Preference,)
    expected = record or Preference(Pair("p", "[1]", 7), Pair("p", "b", 7), 7)
    assert read_row(row, 7, kinds=kinds) == expected


@pytest.mark.parametrize(
    ("kind", "row", "why"),
    [
        (Labelled, {"text": "t", "label": None}, "`label` is null"),
        (Labelled, {"text": "t", "label": " "}, "`label` is empty"),
        (Labelled, {"text": "t", "label": float("nan")}, "`label` is nan"),
        (Labelled, {"text": "t", "labels": ["a", {}]}, "an entry of `labels` is an object"),
        (Labelled, {"text": "", "label": "a"}, "`text` is empty"),
        (Labelled, {"text": "t", "lable": "a"}, "`label` is missing.*Nearest: `lable`"),
        (Tagged, {"tokens": ["a", "b"], "tags": ["O"]}, "`tokens` has 2 entries and `tags` 1"),
        (Tagged, {"tokens": "a b", "tags": ["O"]}, "`tokens` is a string, not a list"),
        (Tagged, {"tokens": [], "tags": []}, "`tokens` is empty"),
        (Tagged, {"tokens": ["a", 3], "tags": ["O", "O"]}, "entry 2 of `tokens` is a number"),
        (Tagged, {"tokens": ["a", "b"], "tags": ["O", None]}, "entry 2 of `tags` is null"),
        (Related, {"anchor": "a", "positive": "p", "negative": "p"}, "`negative` is equal to"),
        (Related, {"anchor": "a", "positive": 3}, "`positive` is a number"),
        (Related, {"sentence1": "a", "sentence2": "b", "score": 4.2}, "4.2.*no cosine can reach"),
        (Related, {"sentence1": "a", "sentence2": "b", "score": "x"}, "'x'.* is no number"),
        (Preference, {"prompt": "p", "chosen": "a", "rejected": "a"}, "is equal to `rejected`"),
        (Preference, {"prompt": "p", "chosen": "a"}, "`rejected` is missing"),
        (Preference, {"prompt": 3, "chosen": "a", "rejected": "b"}, "`prompt` is a number"),
        (Preference, {"prompt": "p", "chosen": [GOOD], "rejected": 3}, "`rejected` is a number"),
        (Preference, {"prompt": "p", "chosen": [ASK], "rejected": [ASK, BAD]}, "no assistant turn"),
        (Preference, {"chosen": [ASK, GOOD], "rejected": [ASK, GOOD, ASK, BAD]}, "goes on where"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_row_that_cannot_be_used_is_told_why(kind, row, why):
    with pytest.raises(Refusal) as told:
        read_row(row, 1, kinds=(kind,))
    assert re.search(why, ". ".join(told.value.args))


def test_what_is_looked_for_decides_what_a_row_is():
    row = {"text": "t", "label": "a"}
    assert read_row(row, 1) == Text("t", 1)
    assert read_row(row, 1, kinds=(Labelled,)) == Labelled("t", "a", None, 1)


def test_a_format_that_gives_nothing_of_use_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(UnsupportedError, match=r"'text'.*It takes `preference`"):
        read(tmp_path / "absent.jsonl", "text", (Preference,))
    check_format("text", LANGUAGE)


def test_bad_lines_are_told_with_their_place(tmp_path):
    rows = [{"tokens": ["a"], "tags": ["O"]}, {"tokens": ["a"], "tags": []}]
    path = write_lines(tmp_path / "d.jsonl", rows)
    found = read(path, kinds=(Tagged,))
    assert found.good == [Tagged(("a",), ("O",), 1)]
    assert [str(bad) for bad in found.bad] == [
        f"{path}:2: `tags` is empty. Give a list with one entry a word."
    ]


def test_equal_records_have_equal_content_wherever_they_stand():
    moved = read_row({"text": "t", "label": "a"}, 9, kinds=(Labelled,))
    assert moved.content == Labelled("t", "a", None, 1).content
    assert moved.content != Labelled("t", "b", None, 1).content
    assert CHATS.content != PAIRS.content
