"""``multigraft generate`` and ``multigraft chat``, as a user runs them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

import multigraft as mg
from multigraft import cli
from tests.merging.models import write_adapter


@pytest.fixture(scope="module")
def adapters(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("adapters")
    config = mg.LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM")
    return [str(write_adapter(root / n, base_dir, config, seed=len(n))) for n in ("ada", "boole")]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def call(*words: str, code: int = 0, stdin: str = "") -> tuple[str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as end:
            cli.main(list(words))
        shown = capsys.readouterr()
        assert end.value.code == code, shown.err
        return shown.out, shown.err

    return call


def both(adapters: list[str]) -> list[str]:
    return ["-a", adapters[0], "-a", adapters[1], "--max-new-tokens", "6"]


def test_answers_stand_side_by_side(run, adapters):
    out, _ = run("generate", "one", "two", *both(adapters), "--compare")
    assert [line.split()[0] for line in out.splitlines() if line.startswith(("ada", "boo", "bas"))]
    for label in ("ada", "boole", "base"):
        assert out.count(f"\n{label:<12} ") == 2
    assert out.index("one\n") < out.index("two\n")


def test_json_is_a_line_an_answer(run, adapters):
    out, _ = run("generate", "one", "two", *both(adapters), "--compare", "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(x["prompt"], x["adapter"]) for x in lines] == [
        (prompt, name) for prompt in ("one", "two") for name in ("ada", "boole", "__base__")
    ]
    assert {x["finish"] for x in lines} <= {"stop", "length"} and all(x["tokens"] for x in lines)
    again, _ = run("generate", *both(adapters), "--compare", "--json", stdin="one\n\ntwo\n")
    assert again == out


def test_prompts_from_a_file(run, adapters, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "one"}\n{"messages": [{"role": "user", "content": "two"}]}\n')
    out, _ = run("generate", "--file", str(path), *both(adapters), "--json")
    straight, _ = run("generate", "one", "two", *both(adapters), "--json")
    assert out == straight


def test_sampling_goes_by_the_seed(run, adapters):
    words = ["generate", "one", *both(adapters), "--json", "--temperature", "2", "--top-p", "0.9"]
    texts = [run(*words, "--seed", seed)[0] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_the_base_alone(run, base_dir):
    out, _ = run("generate", "one", "--base", str(base_dir), "--json", "--max-new-tokens", "3")
    assert json.loads(out)["adapter"] == "__base__"


MISTAKES = {
    "no model": (["one"], "neither a base model nor an adapter"),
    "no adapter there": (["one", "-a", "no-such/adapter/here"], "no-such/adapter/here"),
    "twice": (["one", "--file", "x", "--base", "{base}"], "not in both"),
    "no prompt": (["--base", "{base}"], "there is no prompt"),
    "no file": (["--file", "absent", "--base", "{base}"], "absent cannot be read"),
    "cold": (["one", "--base", "{base}", "--temperature", "-1"], "must be a number from 0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_and_exits_2(run, base_dir, mistake):
    words, says = MISTAKES[mistake]
    _, err = run("generate", *(w.format(base=base_dir) for w in words), code=2)
    assert says in " ".join(err.replace("│", " ").split()) and "Traceback" not in err


def test_a_conversation_through_a_pipe(run, adapters):
    lines = "one\n/adapter ada\ntwo\n/adaptre\n/compare\nthree\n/exit\nfour\n"
    out, err = run("chat", *both(adapters), stdin=lines)
    starts = [line.partition(">")[0] for line in out.splitlines() if ">" in line[:6]]
    assert starts == ["ada", "boole", "ada", "ada", "base"]
    assert "answering: ada, base" in out and "four" not in out
    assert err.startswith("multigraft: `/adaptre` is no command. Nearest: `/adapter`")


def test_a_conversation_as_json(run, adapters):
    words = ["chat", *both(adapters), "--temperature", "0", "--json"]
    lines = [json.loads(line) for line in run(*words, stdin="one\ntwo\n")[0].splitlines()]
    assert [(x["turn"], x["prompt"], x["adapter"]) for x in lines] == [
        (0, "one", "ada"),
        (0, "one", "boole"),
        (1, "two", "ada"),
        (1, "two", "boole"),
    ]


def test_ctrl_c_stops_an_answer_and_not_the_conversation(run, adapters, monkeypatch):
    from multigraft.generation import Conversation

    say, asked = Conversation.say, []

    def interrupted(self, text, on_text=None):
        asked.append(text)
        if text == "one":
            raise KeyboardInterrupt
        return say(self, text, on_text)

    monkeypatch.setattr(Conversation, "say", interrupted)
    out, _ = run("chat", "-a", adapters[0], "--max-new-tokens", "4", stdin="one\ntwo\n")
    assert asked == ["one", "two"] and "stopped" in out


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_help_has_an_example(run, verb):
    assert "Example" in run(verb, "--help")[0]
