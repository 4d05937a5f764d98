"""JSONL: what is read, and what is said of lines that cannot be."""

from __future__ import annotations

import pytest

from multigraft import DataError
from multigraft.train import Chat, Pair, read_jsonl
from multigraft.train.records import SHOWN
from tests.tiny_base import write_lines

USER = {"role": "user", "content": "a"}
ASSISTANT = {"role": "assistant", "content": "b"}


def test_pairs_and_conversations_are_read_with_their_line_numbers(tmp_path):
    rows = [{"prompt": "p", "completion": "c"}, "", {"messages": [USER, ASSISTANT]}]
    records = read_jsonl(write_lines(tmp_path / "d.jsonl", rows)).check()
    assert records == [Pair("p", "c", 1), Chat((USER, ASSISTANT), 3)]


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "p", "completion": "c"}\r\n')
    assert read_jsonl(path).check() == [Pair("p", "c", 1)]


def test_line_separators_inside_a_string_do_not_end_the_line(tmp_path):
    row = '{"prompt": "a\u2028b\u0085c", "completion": "c"}'
    (one,) = read_jsonl(write_lines(tmp_path / "d.jsonl", [row])).check()
    assert one.prompt == "a\u2028b\u0085c"


def test_other_keys_of_a_line_do_no_harm(tmp_path):
    rows = [{"prompt": "p", "completion": "c", "id": 3}]
    assert read_jsonl(write_lines(tmp_path / "d.jsonl", rows)).check() == [Pair("p", "c", 1)]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("not json", "not valid JSON"),
        ("[1, 2]", "a list, not an object"),
        ({"prompt": "p", "completon": "c"}, "`completion` is missing.*Nearest: `completon`"),
        ({"txt": "p"}, "`prompt` is missing.*Its keys are `txt`"),
        ({}, "`prompt` is missing"),
        ({"prompt": 3, "completion": "c"}, "`prompt` is a number, not a string"),
        ({"prompt": "p", "completion": None}, "`completion` is null, not a string"),
        ({"prompt": "p", "completion": " \n"}, "`completion` is empty"),
        ({"messages": []}, "`messages` is not a list of turns"),
        ({"messages": "hi"}, "`messages` is not a list of turns"),
        ({"messages": [{"role": "user"}]}, "turn 1 of `messages` has no text"),
        ({"messages": [{"role": "usr", "content": "a"}]}, "'usr'.*Nearest: `user`"),
        ({"messages": [USER]}, "no assistant turn with text"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "no assistant turn"),
    ],
    ids=str,
)
def test_a_line_that_cannot_be_used_is_named_with_the_reason(tmp_path, row, why):
    path = write_lines(tmp_path / "d.jsonl", [{"prompt": "p", "completion": "c"}, row])
    with pytest.raises(DataError, match=rf"d\.jsonl:2: .*{why}") as raised:
        read_jsonl(path).check()
    assert "\n" not in str(raised.value)
    assert str(raised.value).endswith("(1 of 2 lines cannot be used.)")


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"prompt": "\xff", "completion": "c"}\n')
    with pytest.raises(DataError, match=r"d\.jsonl:1: byte 13 is not UTF-8"):
        read_jsonl(path).check()


def test_what_is_wrong_in_the_same_way_is_said_once(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", [{"messages": [USER]}] * 200)
    with pytest.raises(
        DataError, match=r"d\.jsonl:1 \(and 199 more like it\): no assist"
    ) as raised:
        read_jsonl(path).check()
    assert "\n" not in str(raised.value)


def test_the_message_lists_different_bad_lines_up_to_a_limit(tmp_path):
    rows = [{"messages": [USER, {"role": f"r{n}", "content": "a"}]} for n in range(SHOWN + 3)]
    with pytest.raises(DataError) as raised:
        read_jsonl(write_lines(tmp_path / "d.jsonl", rows)).check()
    lines = str(raised.value).splitlines()
    assert lines[0] == f"{SHOWN + 3} of {SHOWN + 3} lines cannot be used:"
    assert len(lines) == SHOWN + 2
    assert lines[-1] == "… and 3 more."


def test_bad_lines_are_left_out_when_asked(tmp_path):
    records = read_jsonl(
        write_lines(tmp_path / "d.jsonl", ["x", {"prompt": "p", "completion": "c"}])
    )
    assert records.check(skip_bad=True) == [Pair("p", "c", 2)]


def test_a_file_of_bad_lines_alone_is_refused_even_so(tmp_path):
    with pytest.raises(DataError, match="1 of 1 lines"):
        read_jsonl(write_lines(tmp_path / "d.jsonl", ["x"])).check(skip_bad=True)


@pytest.mark.parametrize("rows", [[], ["", "  "]])
def test_an_empty_file_is_refused(tmp_path, rows):
    with pytest.raises(DataError, match=r"d\.jsonl holds no data"):
        read_jsonl(write_lines(tmp_path / "d.jsonl", rows)).check()


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nope\.jsonl cannot be read: No such file"):
        read_jsonl(tmp_path / "nope.jsonl")
