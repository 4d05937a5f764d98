"""What training data consists of: records to learn from, and a report of what cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from multigraft.errors import DataError

SHOWN = 10
"""How many bad lines an error message lists; the report holds them all."""


@dataclass(frozen=True)
class Pair:
    """A prompt and the text that should follow it, both used as they stand."""

    prompt: str
    completion: str
    line: int = 0


@dataclass(frozen=True)
class Chat:
    """A conversation; the assistant's turns are what is learned.

    Args:
        messages: turns of ``role`` and ``content``.
        plain: what to use instead where the tokeniser has no chat template.
    """

    messages: tuple[dict[str, str], ...]
    line: int = 0
    plain: Pair | None = None


@dataclass(frozen=True)
class Text:
    """Text that is learned as a whole."""

    text: str
    line: int = 0


Record = Pair | Chat | Text


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
