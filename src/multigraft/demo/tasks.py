"""The three text transformations that the demo teaches, as data.

Requirements met here:
- every answer is exact, so that exact match is a fair score;
- a case belongs to the training or to the held-out split by a hash of what it is about (the
  date, the person, the words of the identifier), so no case can be in both, and a held-out
  date or person is new in every wording;
- the same seed gives the same cases on every platform and Python version;
- all tasks share one prompt frame that does not name the task: what to do with the input is
  known to the adapter alone, which is what makes the base fail and the routing visible.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from multigraft.demo import words
from multigraft.errors import ConfigError, did_you_mean

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")

# One case in this many is held out.
HELD_OUT_ONE_IN = 10

# The tokenizer's chat template renders a single user message to the same text.
PROMPT = "Input: {text}\nOutput:\n"

FIRST_DAY = datetime.date(1900, 1, 1)
LAST_DAY = datetime.date(2099, 12, 31)


@dataclass(frozen=True)
class Example:
    """A prompt and the one right completion; training appends the end-of-text token."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Case:
    """One drawn case: what it is about (decides the split), its wording, its answer."""

    subject: str
    text: str
    answer: str


@dataclass(frozen=True)
class Task:
    """A text transformation: its name, a line about it, and how one case of it is drawn."""

    name: str
    description: str
    draw: Callable[[random.Random], Case]
    prompt: str = PROMPT


def split_of(subject: str) -> Split:
    """The split a subject belongs to; the same for every seed, wording and machine."""
    digest = hashlib.sha256(subject.encode("utf-8")).digest()
    return "heldout" if int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0 else "train"


def examples(task: Task | str, split: Split, count: int, seed: int = 0) -> list[Example]:
    """`count` different examples of a task, all of one split, in an order set by `seed`."""
    if isinstance(task, str):
        task = find_task(task)
    if split not in SPLITS:
        raise ConfigError(f"examples: `split` (={split!r}) must be one of {', '.join(SPLITS)}.")
    rng = random.Random(f"{task.name}/{split}/{seed}")
    drawn: dict[str, Example] = {}
    while len(drawn) < count:
        case = task.draw(rng)
        if split_of(case.subject) == split:
            prompt = task.prompt.format(text=case.text)
            drawn.setdefault(prompt, Example(prompt, case.answer))
    return list(drawn.values())


def find_task(name: str) -> Task:
    """The task of that name."""
    for task in TASKS:
        if task.name == name:
            return task
    known = [task.name for task in TASKS]
    raise ConfigError(
        f"find_task: `name` (={name!r}) must be one of {', '.join(known)}."
        + did_you_mean(name, known)
    )


# --- dates ---------------------------------------------------------------------------------


def word_date(day: datetime.date, form: int) -> str:
    """A date as people write or say it, in one of `DATE_FORMS` wordings."""
    month, year = words.MONTHS[day.month - 1], words.year_in_words(day.year)
    nth = words.ordinal_digits(day.day)
    return (
        f"the {words.ordinal(day.day)} of {month}, {year}",
        f"{month} {words.ordinal(day.day)}, {year}",
        f"{month} {nth}, {day.year}",
        f"{day.day} {month} {day.year}",
        f"{words.WEEKDAYS[day.weekday()]}, the {nth} of {month} {day.year}",
    )[form]


DATE_FORMS = 5


def draw_day(rng: random.Random) -> datetime.date:
    """A day from `FIRST_DAY` to `LAST_DAY`."""
    return FIRST_DAY + datetime.timedelta(days=rng.randrange((LAST_DAY - FIRST_DAY).days + 1))


def draw_date(rng: random.Random) -> Case:
    """A date in words, to be written as ISO 8601."""
    day = draw_day(rng)
    return Case(day.isoformat(), word_date(day, rng.randrange(DATE_FORMS)), day.isoformat())


# --- people --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Person:
    """Somebody who does not exist; the fields are in the order of the JSON answer."""

    name: str
    age: int
    job: str
    city: str


PERSON_SENTENCES = (
    "{name} is {an_age}-year-old {job} from {city}.",
    "{name}, aged {age}, works as {a_job} in {city}.",
    "My name is {name}, I am {age} and I work in {city} as {a_job}.",
    "In {city} lives {name}, {a_job}, who is {age} years old.",
    "Our new {job} {name} from {city} has just turned {age}.",
)


AGES_WITH_AN = (18, *range(80, 90))


def person_sentence(person: Person, form: int) -> str:
    """A sentence that tells all four facts, in one of the `PERSON_SENTENCES`."""
    an_age = f"{'an' if person.age in AGES_WITH_AN else 'a'} {person.age}"
    a_job = f"{'an' if person.job[0] in 'aeiou' else 'a'} {person.job}"
    return PERSON_SENTENCES[form].format(**vars(person), an_age=an_age, a_job=a_job)


def draw_person(rng: random.Random) -> Person:
    """Somebody of working age."""
    return Person(
        name=f"{rng.choice(words.FIRST_NAMES)} {rng.choice(words.LAST_NAMES)}",
        age=rng.randrange(18, 90),
        job=rng.choice(words.JOBS),
        city=rng.choice(words.CITIES),
    )


def draw_record(rng: random.Random) -> Case:
    """A sentence about a person, to be written as JSON. Held-out people are new by name."""
    person = draw_person(rng)
    sentence = person_sentence(person, rng.randrange(len(PERSON_SENTENCES)))
    return Case(person.name, sentence, json.dumps(vars(person)))


# --- identifiers ---------------------------------------------------------------------------

STYLES: dict[str, Callable[[Sequence[str]], str]] = {
    "snake_case": "_".join,
    "camelCase": lambda parts: parts[0] + "".join(part.title() for part in parts[1:]),
    "PascalCase": lambda parts: "".join(part.title() for part in parts),
    "kebab-case": "-".join,
    "CONSTANT_CASE": lambda parts: "_".join(part.upper() for part in parts),
    "dotted.case": ".".join,
}


def draw_words(rng: random.Random) -> tuple[str, ...]:
    """Two to four different words that make an identifier."""
    return tuple(rng.sample(words.IDENTIFIER_WORDS, rng.randrange(2, 5)))


def draw_identifier(rng: random.Random) -> Case:
    """An identifier in camel, Pascal or kebab case, to be written in snake case."""
    parts = draw_words(rng)
    style = rng.choice(("camelCase", "PascalCase", "kebab-case"))
    return Case("_".join(parts), STYLES[style](parts), "_".join(parts))


TASKS = (
    Task("dates", "a date in words to ISO 8601", draw_date),
    Task("records", "a sentence about a person to JSON", draw_record),
    Task(
        "identifiers", "an identifier in camel, Pascal or kebab case to snake_case", draw_identifier
    ),
)
