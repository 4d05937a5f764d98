"""Conversations: histories, commands, and what goes wrong in them."""

from __future__ import annotations

import pytest

from multigraft.errors import AdapterNameError, ConfigError
from multigraft.generation import BASE, Conversation, Ensemble, Prompt, Sampling, write

SHORT = Sampling(max_new_tokens=5)


def talk_of(ensemble: Ensemble, *speakers: str, system: str | None = None) -> Conversation:
    return Conversation(ensemble, list(speakers), SHORT, system)


def test_each_speaker_goes_on_from_its_own_answers(ensemble: Ensemble):
    talk = talk_of(ensemble, "first", BASE, system="short")
    one, two = talk.say("one"), talk.say("two")
    for number, speaker in enumerate(["first", BASE]):
        turns = [("system", "short"), ("user", "one"), ("assistant", one[number].text)]
        turns += [("user", "two")]
        prompt = Prompt(tuple({"role": r, "content": c} for r, c in turns))
        alone = next(write(ensemble, [prompt], [speaker], SHORT))
        assert (two[number].speaker, two[number].text) == (speaker, alone.text)


def test_who_comes_later_knows_what_the_first_knows(ensemble: Ensemble):
    talk = talk_of(ensemble, "first")
    talk.say("one")
    assert talk.do("/adapter second, first") == "answering: second, first"
    assert talk.turns["second"] == talk.turns["first"] != []
    assert [answer.speaker for answer in talk.say("two")] == ["second", "first"]
    assert talk.do("/compare") == "answering: second, first, base"
    assert talk.turns[BASE] == talk.turns["second"]
    assert talk.do("/compare") == "answering: second, first"


def test_reset_and_system_begin_anew(ensemble: Ensemble):
    talk = talk_of(ensemble, "first")
    fresh = talk.say("one")[0].text
    talk.say("two")
    talk.do("/reset")
    assert talk.turns == {} and talk.say("one")[0].text == fresh
    talk.do("/system be short")
    assert (talk.system, talk.turns) == ("be short", {})


def test_other_commands(ensemble: Ensemble):
    talk = talk_of(ensemble, "first")
    assert talk.do("/adapter").endswith("there are: first, second, scaled, prompted, base")
    assert talk.do("/temperature 0.5") == "temperature 0.5" and talk.sampling.temperature == 0.5
    assert "/compare" in talk.do("/help")
    assert talk.do("/exit") == "" and talk.is_over


@pytest.mark.parametrize(
    ("line", "error", "says"),
    [
        ("/adaptre x", ConfigError, "no command. Nearest: `/adapter`"),
        ("/adapter secnd", AdapterNameError, "Nearest: `second`"),
        ("/temperature warm", ConfigError, "must be a number"),
        ("/temperature -1", ConfigError, "must be a number"),
    ],
)
def test_a_command_that_fails_changes_nothing(ensemble: Ensemble, line, error, says):
    talk = talk_of(ensemble, "first")
    with pytest.raises(error, match=says):
        talk.do(line)
    assert (talk.speakers, talk.sampling) == (["first"], SHORT)


def test_the_base_alone_is_not_compared(ensemble: Ensemble):
    with pytest.raises(ConfigError, match="nothing to compare"):
        talk_of(ensemble, BASE).do("/compare")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ConfigError])
def test_a_question_that_is_cut_short_was_never_asked(ensemble: Ensemble, error: type):
    talk = talk_of(ensemble, "first")
    talk.say("one")
    before = list(talk.turns["first"])

    def stop(row: int, text: str) -> None:
        raise error

    with pytest.raises(error):
        talk.say("two", stop)
    assert talk.turns["first"] == before and talk.count == 1
    assert talk.say("two")[0].text


def test_a_conversation_that_is_too_long_says_so(ensemble: Ensemble):
    talk = talk_of(ensemble, "first")
    with pytest.raises(ConfigError, match="begin the conversation anew"):
        talk.say("word " * 200)
    assert talk.say("one")
