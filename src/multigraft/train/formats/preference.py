"""A prompt and two answers, of which one is preferred: texts as they stand, or turns.

Data sets write it in several ways, and all are read:

    {"prompt": "…", "chosen": "…", "rejected": "…"}
    {"prompt": [turns], "chosen": [turns], "rejected": [turns]}
    {"prompt": "…", "chosen": [turns], "rejected": [turns]}      the turns may begin with the prompt
    {"chosen": …, "rejected": …}                                 what both begin with is the prompt
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from multigraft.train.formats._turns import turns
from multigraft.train.formats.contract import Format, Values, kind, learnable, nested
from multigraft.train.records import Chat, Pair, Preference, Refusal

Turns = list[Any]


def read(row: Values, line: int) -> Preference:
    """One preference.

    Raises:
        Refusal: the two answers are equal, or are not of one kind.
    """
    prompt, chosen, rejected = (_side(row.get(key)) for key in ("prompt", "chosen", "rejected"))
    if isinstance(chosen, list) or isinstance(rejected, list) or isinstance(prompt, list):
        return _of_turns(prompt, _turns(chosen, "chosen"), _turns(rejected, "rejected"), line)
    good, bad = learnable(row, "chosen"), learnable(row, "rejected")
    _refuse_equal(good, bad)
    if prompt is None:
        prompt = _common_text(good, bad)
        good, bad = good[len(prompt) :], bad[len(prompt) :]
    elif not isinstance(prompt, str):
        raise Refusal(f"`prompt` is {kind(prompt)}", "Give a string, or a list of turns")
    return Preference(Pair(prompt, good, line), Pair(prompt, bad, line), line)


def _side(value: Any) -> Any:
    """A text as it stands, unless it is the JSON of turns, as tables hold them."""
    found = nested(value)
    is_turns = isinstance(found, list) and all(isinstance(turn, dict) for turn in found)
    return found if is_turns else value


def _of_turns(prompt: Any, chosen: Turns, rejected: Turns, line: int) -> Preference:
    _refuse_equal(chosen, rejected)
    before = _before(prompt, chosen)
    if before is None:
        shared = _common(chosen, rejected)
        before, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not chosen or not rejected:
        raise Refusal("one answer goes on where the other ends", "Give both of them as a last turn")
    sides = (
        Chat(turns([*before, *own], key), line, None, len(before))
        for own, key in ((chosen, "chosen"), (rejected, "rejected"))
    )
    good, bad = map(_answered, sides)
    return Preference(good, bad, line)


def _before(prompt: Any, chosen: Turns) -> Turns | None:
    """The turns of the prompt; None where the answers hold it themselves."""
    if isinstance(prompt, list):
        return None if prompt and chosen[: len(prompt)] == prompt else prompt
    if prompt is not None and not isinstance(prompt, str):
        raise Refusal(f"`prompt` is {kind(prompt)}", "Give a string, or a list of turns")
    first = turns(chosen, "chosen")[0]
    if not prompt or first["role"] != "assistant":
        return None
    return [{"role": "user", "content": prompt}]


def _answered(side: Chat) -> Chat:
    """The side, where an assistant's turn follows its prompt."""
    if not any(turn["role"] == "assistant" for turn in side.messages[side.given :]):
        raise Refusal("an answer has no assistant turn", "Give `chosen` and `rejected` one each")
    return side


def _turns(value: Any, key: str) -> Turns:
    """A list of turns as it stands; a text is one turn of the assistant."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    if not isinstance(value, list) or not value:
        raise Refusal(f"`{key}` is {kind(value)}", "Give a string, or a list of turns")
    return value


def _refuse_equal(chosen: Any, rejected: Any) -> None:
    if chosen == rejected:
        raise Refusal("`chosen` is equal to `rejected`, so there is nothing to learn", "Drop it")


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many entries the two begin with alike."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _common_text(one: str, other: str) -> str:
    """What both begin with, without the word in which they part and the white space before it."""
    common = one[: _common(one, other)]
    last = next((at for at in range(len(common) - 1, -1, -1) if common[at].isspace()), 0)
    return common[:last].rstrip()


FORMAT = Format(
    "preference",
    ("chosen", "rejected"),
    read,
    '{"prompt": "Say hello.", "chosen": "Hello!", "rejected": "No."}',
    (Preference,),
)
