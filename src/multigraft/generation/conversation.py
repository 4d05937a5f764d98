"""A conversation with one speaker or with several side by side, each with its own history."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from multigraft.errors import ConfigError, MultigraftError, did_you_mean
from multigraft.generation.ensemble import BASE, Ensemble, shown
from multigraft.generation.prompts import Prompt
from multigraft.generation.sampling import Sampling
from multigraft.generation.write import OnText, Row, Written, write_rows

Turns = list[dict[str, str]]


@dataclass(eq=False)
class Conversation:
    """What was said so far, and who answers next.

    Args:
        ensemble: all that can be asked.
        speakers: who answers now, in this order.
        system: what the system is told before the first turn.
        turns: by speaker: what it was told, and what it answered.
        count: how many questions were answered.
    """

    ensemble: Ensemble
    speakers: list[str]
    sampling: Sampling
    system: str | None = None
    turns: dict[str, Turns] = field(default_factory=dict)
    count: int = 0
    is_over: bool = False

    def __post_init__(self) -> None:
        self.speakers = self.ensemble.require(self.speakers)

    def say(self, text: str, on_text: OnText | None = None) -> list[Written]:
        """Ask those who answer now; the rows of `on_text` are theirs, in their order.

        A question that fails, or is interrupted, was never asked.

        Raises:
            ConfigError: the conversation is longer than the model takes.
        """
        system = () if self.system is None else (_turn("system", self.system),)
        rows, asked = [], {}
        for name in self.speakers:
            asked[name] = [*self.history(name), _turn("user", text)]
            prompt = Prompt((*system, *asked[name]))
            rows.append(Row(self.count, prompt.ids(self.ensemble.tokenizer_of(name)), name))
        answers = write_rows(self.ensemble, rows, self.sampling, on_text=on_text)
        for answer in answers:
            own = asked[answer.speaker]
            self.turns[answer.speaker] = [*own, _turn("assistant", answer.text)]
        self.count += 1
        return answers

    def history(self, speaker: str) -> Turns:
        """What a speaker knows of the conversation; who comes later knows what the first knows."""
        if speaker not in self.turns:
            known = next((self.turns[n] for n in self.speakers if n in self.turns), [])
            self.turns[speaker] = [*known]
        return self.turns[speaker]

    def do(self, line: str) -> str:
        """Carry out a command such as ``/adapter dates``; what to tell the user.

        Raises:
            ConfigError: there is no such command.
            AdapterNameError: there is no such adapter.
        """
        name, _, argument = line.strip().partition(" ")
        command = COMMANDS.get(name)
        if command is None:
            raise ConfigError(f"`{name}` is no command.{did_you_mean(name, COMMANDS)} Try /help.")
        return command.run(self, argument.strip())


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@dataclass(frozen=True)
class Command:
    """A command of the conversation: what it takes, what it does, and the function that does it."""

    takes: str
    does: str
    run: Callable[[Conversation, str], str]


def _adapter(talk: Conversation, argument: str) -> str:
    if not argument:
        names = ", ".join([*talk.ensemble.adapters, "base"])
        return f"answering: {_names(talk)}; there are: {names}"
    wanted = talk.ensemble.require([name.strip() for name in argument.split(",") if name.strip()])
    for name in wanted:
        talk.history(name)  # from those who answered so far
    talk.speakers = wanted
    return f"answering: {_names(talk)}"


def _compare(talk: Conversation, argument: str) -> str:
    talk.history(BASE)
    others = [name for name in talk.speakers if name != BASE]
    is_on = len(others) < len(talk.speakers)
    if is_on and not others:
        raise ConfigError("the base answers alone, so there is nothing to compare. Try /adapter.")
    talk.speakers = others if is_on else [*others, BASE]
    return f"answering: {_names(talk)}"


def _reset(talk: Conversation, argument: str) -> str:
    talk.turns.clear()
    return "the conversation begins anew"


def _system(talk: Conversation, argument: str) -> str:
    talk.system = argument or None
    talk.turns.clear()
    return "the conversation begins anew" + (" with that" if argument else "")


def _temperature(talk: Conversation, argument: str) -> str:
    try:
        talk.sampling = replace(talk.sampling, temperature=float(argument))
    except ValueError as error:
        if isinstance(error, MultigraftError):
            raise
        raise ConfigError(f"`temperature` (={argument!r}) must be a number from 0.") from None
    return f"temperature {talk.sampling.temperature:g}"


def _exit(talk: Conversation, argument: str) -> str:
    talk.is_over = True
    return ""


def _help(talk: Conversation, argument: str) -> str:
    width = max(len(f"{name} {c.takes}") for name, c in COMMANDS.items())
    return "\n".join(f"{f'{n} {c.takes}':<{width}}  {c.does}" for n, c in COMMANDS.items())


def _names(talk: Conversation) -> str:
    return ", ".join(map(shown, talk.speakers))


COMMANDS = {
    "/adapter": Command("NAME[,NAME]", "who answers; several answer side by side", _adapter),
    "/compare": Command("", "the base answers too, or no longer", _compare),
    "/reset": Command("", "forget what was said", _reset),
    "/system": Command("TEXT", "what the system is told; begins anew", _system),
    "/temperature": Command("NUMBER", "0 for the likeliest answer", _temperature),
    "/help": Command("", "this list", _help),
    "/exit": Command("", "leave (so does the end of the input)", _exit),
}
