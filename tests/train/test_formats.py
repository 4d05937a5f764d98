"""Formats: what each makes of a row, and what it says of one that it cannot use."""

from __future__ import annotations

import json

import pytest

from multigraft.train import Chat, Pair, Text, encode_one, formats, load_tokenizer
from multigraft.train.formats import FORMATS, read_row
from multigraft.train.records import Refusal
from tests.tiny_base import write_base


def turns(*pairs: tuple[str, str]) -> tuple[dict[str, str], ...]:
    return tuple({"role": role, "content": text} for role, text in pairs)


ASKED = turns(("user", "q"), ("assistant", "a"))


@pytest.mark.parametrize(
    ("row", "record"),
    [
        ({"prompt": "p", "completion": "c"}, Pair("p", "c", 7)),
        ({"text": "t"}, Text("t", 7)),
        ({"messages": list(ASKED), "prompt": "q"}, Chat(ASKED, 7)),
        ({"messages": json.dumps(ASKED)}, Chat(ASKED, 7)),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ASKED[1]]},
            Chat(ASKED, 7),
        ),
        (
            {
                "system": "s",
                "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
            },
            Chat((*turns(("system", "s")), *ASKED), 7),
        ),
        ({"conversations": list(ASKED)}, Chat(ASKED, 7)),
        (
            {"instruction": "q", "output": "a", "history": [["q", "a"]], "system": "s"},
            Chat((*turns(("system", "s")), *ASKED, *ASKED), 7),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_row_is_known_by_its_keys(row, record):
    assert read_row(row, 7) == record


def test_an_instruction_with_input_is_one_question(base_dir):
    record = read_row({"instruction": "Do {x}.", "input": "this", "output": "a"}, 1)
    assert record.messages == turns(("user", "Do {x}.\n\nthis"), ("assistant", "a"))
    tokenizer = load_tokenizer(base_dir)
    assert encode_one(record, tokenizer) == encode_one(Chat(record.messages), tokenizer)


def test_an_instruction_goes_into_alpacas_frame_where_there_is_no_chat_template(tmp_path):
    tokenizer = load_tokenizer(write_base(tmp_path / "base", template=False))
    for given in ("", "this"):
        record = read_row({"instruction": "Do it.", "input": given, "output": "done"}, 1)
        example = encode_one(record, tokenizer)
        text = tokenizer.decode(example.ids)
        assert "### Instruction:\nDo it.\n\n" in text
        assert ("### Input:\nthis\n\n" in text) == bool(given)
        learned = [i for i, flag in zip(example.ids, example.learned, strict=True) if flag]
        assert tokenizer.decode(learned, skip_special_tokens=True) == "done"


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"instruction": "q", "outptu": "a"}, "`output` is missing.*`alpaca`.*Nearest: `outptu`"),
        ({"instruction": "q", "output": ""}, "`output` is empty"),
        ({"instruction": "q", "output": "a", "history": "x"}, "`history` is not a list"),
        ({"conversations": [{"from": "human", "value": "q"}]}, "no assistant turn"),
        ({"conversations": [{"from": "humn", "value": "q"}]}, "'humn'.*Nearest: `human`"),
        ({"conversations": [{"from": "gpt", "value": None}]}, "turn 1 .* no text in `value`"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "no text in `content`"),
        ({"text": 3}, "`text` is a number, not a string"),
        ({"text": " "}, "`text` is empty"),
        ({"question": "q"}, "`prompt` is missing.*Its keys are `question`"),
    ],
    ids=str,
)
def test_a_row_that_cannot_be_used_is_told_why(row, why):
    with pytest.raises(Refusal) as raised:
        read_row(row, 1)
    import re

    assert re.search(why, ". ".join(raised.value.args))


def test_a_format_that_is_named_is_held_to():
    both = {"prompt": "p", "completion": "c", "text": "t"}
    assert read_row(both, 1, "text") == Text("t", 1)
    with pytest.raises(Refusal, match="`messages` is missing"):
        read_row(both, 1, "messages")


def test_the_example_of_every_format_is_of_that_format():
    assert formats() == ["auto", *FORMATS]
    for name, each in FORMATS.items():
        row = json.loads(each.example)
        assert read_row(row, 1, kinds=each.makes) == read_row(row, 1, name)
