"""`multigraft preview`, and the data flags of `multigraft train`, as a user runs them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from multigraft.cli import main
from tests.tiny_base import chat_rows, pair_rows, write_base, write_lines

PAGE = Path(__file__).resolve().parents[2] / "docs" / "data.md"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return str(write_base(tmp_path_factory.mktemp("base")))


@pytest.fixture
def run(capsys):
    def call(*words: str, code: int = 0) -> str:
        with pytest.raises(SystemExit) as end:
            main(list(words))
        out, err = capsys.readouterr()
        assert end.value.code == code, err
        return out + err

    return call


def test_what_is_trained_on_is_marked_and_counted(run, base, tmp_path):
    data = write_lines(tmp_path / "d.jsonl", [*pair_rows()[:2], *chat_rows()[:1]])
    text = run("preview", str(data), "--model", base, "--limit", "1")
    assert "Input: 0\nOutput:\n⟦000<|endoftext|>⟧" in text
    assert "d.jsonl:1" in text and "d.jsonl:2" not in text
    assert "1 chat, 2 pair; 3 examples" in text


def test_bad_lines_are_told_and_the_exit_code_says_so(run, base, tmp_path):
    data = write_lines(tmp_path / "d.jsonl", [*pair_rows()[:2], "no"])
    found = json.loads(run("preview", str(data), "--model", base, "--json", code=1))
    assert [bad["line"] for bad in found["bad"]] == [3]
    assert found["kinds"] == {"pair": 2}
    assert "cannot be read" in run("preview", "absent.jsonl", "--model", base, code=2)


def test_the_data_flags_of_train(run, base, tmp_path):
    data = str(write_lines(tmp_path / "d.jsonl", [*pair_rows(), "no"]))
    out = str(tmp_path / "out")
    words = ["train", "--model", base, "--data", data, "-o", out, "--steps", "2"]
    flags = "--on-bad-line skip --eval-split 0.4 --packing --group-by-length --max-length 64"
    text = run(*words, *flags.split(), "--format", "prompt-completion")
    assert re.search(r"\d+ examples packed into \d+ rows", text)
    assert re.search(r"held-out loss.*\n.*→.*→", text)
    again = [*words, "--overwrite"]
    assert "Nearest: `skip`" in run(*again, "--on-bad-line", "skp", code=2)
    assert "format `alpacca` is unknown" in run(*again, "--format", "alpacca", code=2)
    assert "between 0 and 1" in run(*again, "--eval-split", "3", code=2)


def test_the_page_runs_as_written(base, tmp_path, monkeypatch):
    write_lines(tmp_path / "chats.jsonl", chat_rows())
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8").replace("MODEL", base)
    names: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        exec(compile(block, "data.md", "exec"), names)
    assert names["records"].good and names["found"].lengths


def test_a_task_is_shown_with_its_labels(run, base, tmp_path):
    rows = [{"text": "fine", "label": "good"}, {"text": "poor", "label": "bad"}]
    data = str(write_lines(tmp_path / "d.jsonl", rows))
    text = run("preview", data, "--model", base, "--task", "seq-cls", "--limit", "1")
    assert "fine → ⟦good⟧" in text
    assert re.search(r"classes +bad, good", text)
    assert "2 labelled; 2 examples" in text
    given = "{name: seq-cls, labels: [bad, goood]}"
    assert "'good' is unknown" in run("preview", data, "--model", base, "--task", given, code=1)
    assert "Nearest: `seq-cls`" in run("preview", data, "--model", base, "--task", "seqcls", code=2)
    assert "no mapping" in run("preview", data, "--model", base, "--task", "{name: [", code=2)
