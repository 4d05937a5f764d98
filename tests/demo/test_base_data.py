"""What the demo base was trained on holds no held-out case and no task as it is asked."""

from __future__ import annotations

import json
import random

import pytest

from demo.base_skills import FIELDS, document
from demo.base_text import subjects, without_held_out
from multigraft.demo import TASKS, examples, words
from multigraft.demo.tasks import split_of

# Held-out cases, one of each kind, as a library line could mention them.
HELD_OUT = {
    "dates": examples("dates", "heldout", 1)[0].completion,
    "people": json.loads(examples("records", "heldout", 1)[0].completion)["name"],
    "identifiers": examples("identifiers", "heldout", 1)[0].completion,
}


def is_subject(found: str) -> bool:
    """Whether this is no mere pair of capitalised words, which `subjects` also reports."""
    first, _, last = found.partition(" ")
    return not last or (first in words.FIRST_NAMES and last in words.LAST_NAMES)


@pytest.fixture(scope="module")
def documents():
    rng = random.Random(3)
    return [document(rng, ["alpha", "beta", "gamma", "delta"]) for _ in range(6000)]


def test_generated_text_never_mentions_a_held_out_subject(documents):
    lines = [line for text in documents for line in text.splitlines()]
    found = [subject for line in lines for subject in subjects(line) if is_subject(subject)]
    assert len(found) > 5000
    assert {split_of(subject) for subject in found} == {"train"}


def test_generated_text_never_shows_the_prompt_frame_or_the_records_answer(documents):
    text = "\n".join(documents)
    before, after = TASKS[0].prompt.split("{text}")
    assert after not in text
    assert not any(line.startswith(before) for line in text.splitlines())
    assert '{"name": "' in text
    answers = [line for line in text.splitlines() if line.startswith('{"name": "')]
    assert not any(tuple(json.loads(line)) == FIELDS for line in answers if line.endswith("}"))


@pytest.mark.parametrize("mention", HELD_OUT.values(), ids=HELD_OUT)
def test_library_lines_that_mention_a_held_out_subject_are_dropped(mention):
    assert without_held_out(f"before\n    see {mention} here\nafter") == "before\nafter"


def test_an_identifier_is_known_in_any_style():
    parts = HELD_OUT["identifiers"].split("_")
    camel = parts[0] + "".join(part.title() for part in parts[1:])
    for spelled in (camel, camel[0].upper() + camel[1:], "-".join(parts), "_".join(parts).upper()):
        assert HELD_OUT["identifiers"] in set(subjects(f"x = {spelled}(y)"))
