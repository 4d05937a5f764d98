"""What training data consists of: records to learn from, and a report of what cannot be used."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from multigraft.errors import DataError

SHOWN = 10
"""How many bad lines an error message lists; the report holds them all."""


class Record:
    """What one line of data holds; each kind is a frozen dataclass."""

    line: int

    @property
    def content(self) -> str:
        """What it says, wherever it stands."""
        raise NotImplementedError


@dataclass(frozen=True)
class Pair(Record):
    """A prompt and the text that should follow it, both used as they stand."""

    prompt: str
    completion: str
    line: int = 0

    @property
    def content(self) -> str:
        return f"{self.prompt}\0{self.completion}"


@dataclass(frozen=True)
class Chat(Record):
    """A conversation; the assistant's turns are what is learned.

    Args:
        messages: turns of ``role`` and ``content``.
        plain: what to use instead where the tokeniser has no chat template.
        given: how many turns at its start are given, of which nothing is learned.
    """

    messages: tuple[dict[str, str], ...]
    line: int = 0
    plain: Pair | None = None
    given: int = 0

    @property
    def content(self) -> str:
        return json.dumps(self.messages, ensure_ascii=False, sort_keys=True)


@dataclass(frozen=True)
class Text(Record):
    """Text that is learned as a whole."""

    text: str
    line: int = 0

    @property
    def content(self) -> str:
        return self.text


Label = str | int | float
"""A class by its name or number, or a value."""


@dataclass(frozen=True)
class Labelled(Record):
    """A text, perhaps beside a second one, and what it is.

    Args:
        label: one class or value; a tuple of those that hold, or of several values.
        other: the second text of a pair.
    """

    text: str
    label: Label | tuple[Label, ...]
    other: str | None = None
    line: int = 0

    @property
    def content(self) -> str:
        return json.dumps([self.text, self.other, self.label], ensure_ascii=False)


@dataclass(frozen=True)
class Tagged(Record):
    """Words, and a tag for each."""

    words: tuple[str, ...]
    tags: tuple[Label, ...]
    line: int = 0

    @property
    def content(self) -> str:
        return json.dumps([self.words, self.tags], ensure_ascii=False)


@dataclass(frozen=True)
class Related(Record):
    """Two texts that belong together.

    Args:
        negative: a text that does not belong to the anchor.
        score: how alike the two are, where that is known.
    """

    anchor: str
    positive: str
    negative: str | None = None
    score: float | None = None
    line: int = 0

    @property
    def content(self) -> str:
        texts = [self.anchor, self.positive, self.negative, self.score]
        return json.dumps(texts, ensure_ascii=False)


@dataclass(frozen=True)
class Preference(Record):
    """Two answers to one prompt, of which one is preferred; both hold the prompt."""

    chosen: Pair | Chat
    rejected: Pair | Chat
    line: int = 0

    @property
    def content(self) -> str:
        return f"{self.chosen.content}\0{self.rejected.content}"


LANGUAGE: tuple[type[Record], ...] = (Pair, Chat, Text)
"""What language models learn from."""


@dataclass(frozen=True)
class BadLine:
    """A line that cannot be used: where, why, and what to do about it."""

    file: str
    line: int
    why: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.why}. {self.remedy}."


class Refusal(Exception):
    """Why a line cannot be used, and the remedy; a `BadLine` as soon as the place is known."""

    def at(self, file: str, line: int) -> BadLine:
        """This refusal at its place."""
        return BadLine(file, line, *self.args)


@dataclass
class Records:
    """What a file holds: the usable records, and a report of the other lines."""

    file: str
    good: list[Record] = field(default_factory=list)
    bad: list[BadLine] = field(default_factory=list)

    def check(self, *, skip_bad: bool = False) -> list[Record]:
        """The usable records.

        Raises:
            DataError: there are bad lines (unless ``skip_bad``), or no usable ones.
        """
        check_lines(self.file, self.bad, len(self.good), skip_bad=skip_bad)
        return self.good


def check_lines(source: str, bad: Sequence[BadLine], good: int, *, skip_bad: bool) -> None:
    """Fail when lines are bad (unless ``skip_bad``) or none is good.

    Raises:
        DataError: with the report of the bad lines.
    """
    if bad and not (skip_bad and good):
        raise DataError(report(bad, good))
    if not good:
        raise DataError(f"{source} holds no data. Give it one example at least.")


def report(bad: Sequence[BadLine], good: int) -> str:
    """A message about the bad lines: one alone in a line, several listed, up to `SHOWN` of them.

    What is wrong with many lines in the same way is said once, at the first of them.
    """
    alike: dict[tuple[str, str, str], list[BadLine]] = {}
    for line in bad:
        alike.setdefault((line.file, line.why, line.remedy), []).append(line)
    lines = [_told(group) for group in alike.values()]
    count = f"{len(bad)} of {len(bad) + good} lines cannot be used"
    if len(lines) == 1:
        return f"{lines[0]} ({count}.)"
    more = [f"… and {len(lines) - SHOWN} more."] if len(lines) > SHOWN else []
    return "\n".join([f"{count}:", *lines[:SHOWN], *more])


def _told(alike: list[BadLine]) -> str:
    first, others = alike[0], len(alike) - 1
    also = f" (and {others} more like it)" if others else ""
    return f"{first.file}:{first.line}{also}: {first.why}. {first.remedy}."
