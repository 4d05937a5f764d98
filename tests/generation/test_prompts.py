"""Prompts from files, in the ways that people write them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from multigraft.errors import DataError
from multigraft.generation import read_prompts


def test_a_text_file_is_a_prompt_a_line(tmp_path: Path):
    (tmp_path / "p.txt").write_text("one\n\n two \r\n")
    assert [prompt.text for prompt in read_prompts(tmp_path / "p.txt")] == ["one", " two "]


def test_json_lines_have_a_prompt_or_messages(tmp_path: Path):
    user, system = {"role": "user", "content": "hi"}, {"role": "system", "content": "s"}
    answer = {"role": "assistant", "content": "hello"}
    rows = [{"prompt": "one"}, {"messages": [user]}, {"messages": [system, user, answer]}]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = read_prompts(path, system="be short")
    told = {"role": "system", "content": "be short"}
    assert found[0].messages == (told, {"role": "user", "content": "one"})
    assert found[1].messages == (told, user)
    assert found[2].messages == (system, user)  # its own system, and without the answer


def test_lines_that_are_no_prompts_are_listed(tmp_path: Path):
    path = tmp_path / "p.jsonl"
    bad = ['{"text": "x"}', "nothing", '{"messages": []}', '{"messages": [{"role": 1}]}', "[1]"]
    path.write_text("\n".join(['{"prompt": "one"}', *bad]))
    with pytest.raises(DataError, match="lines 2, 3, 4, 5, 6 are no prompts"):
        read_prompts(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(tmp_path / "none")
