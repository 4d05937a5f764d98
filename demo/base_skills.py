"""Generated text that gives the demo base the ingredients of the tasks, but not the tasks.

Every document is a short table: pairs of the same thing written in two ways, in one of many
layouts. Which two ways is drawn anew for each document, and most often it is the same way
twice. So the base learns to read and write every notation and to copy, but it has no reason
to prefer the notation that a task wants; the task's prompt frame never occurs, nor does the
exact JSON of the record task. Only training subjects are drawn (see `tasks.split_of`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from itertools import permutations

from multigraft.demo import words
from multigraft.demo.tasks import (
    DATE_FORMS,
    PERSON_SENTENCES,
    STYLES,
    Person,
    draw_day,
    draw_person,
    draw_words,
    person_sentence,
    split_of,
    word_date,
)

LAYOUTS = (
    "{a} -> {b}\n", "{a} = {b}\n", "{a}: {b}\n", "{a}\t{b}\n", "{a} | {b}\n", "{a}\n{b}\n",
    "{a}\n{b}\n\n", "- {a}\n  {b}\n", "{a}\n    {b}\n", "{a}, that is, {b}\n", "{a} ({b})\n",
    "# {a}\n{b}\n", ">>> {a}\n{b}\n", "* {a} * {b}\n", "{a} => {b}\n",
)  # fmt: skip
MOST_ROWS = 6
SAME_WAY_TWICE = 0.25

Row = Callable[[], Sequence[str]]


def table(rng: random.Random, row: Row, sources: int, targets: Sequence[float]) -> str:
    """Rows of one layout. `row()` gives one thing in all its notations.

    The first `sources` notations tell everything, so any other can be derived from them;
    `targets` weights the notations to derive.
    """
    layout = rng.choice(LAYOUTS)
    source = rng.randrange(sources)
    target = rng.choices(range(len(targets)), targets)[0]
    if rng.random() < SAME_WAY_TWICE:
        target = source
    rows = (row() for _ in range(rng.randint(1, MOST_ROWS)))
    text = "".join(layout.format(a=ways[source], b=ways[target]) for ways in rows)
    # Ends at the last answer, so that ending there is a known thing to do.
    return text.rstrip("\n")


def dates(rng: random.Random) -> str:
    """Dates in words, in digits, as code."""

    def row() -> Sequence[str]:
        day = draw_day(rng)
        while split_of(day.isoformat()) == "heldout":
            day = draw_day(rng)
        return (
            *(word_date(day, form) for form in range(DATE_FORMS)),
            day.isoformat(),
            f"{day.month:02}/{day.day:02}/{day.year}",
            f"{day.day}.{day.month}.{day.year}",
            f"datetime.date({day.year}, {day.month}, {day.day})",
            f"{day.year}{day.month:02}{day.day:02}",
        )

    return table(rng, row, DATE_FORMS + 5, [1] * DATE_FORMS + [3, 3, 3, 2, 2])


def numbers(rng: random.Random) -> str:
    """Numbers, months and years in words and digits."""
    kind = rng.randrange(4)

    def row() -> Sequence[str]:
        if kind == 0:
            month = rng.randrange(12)
            return words.MONTHS[month], f"{month + 1:02}", str(month + 1)
        if kind == 1:
            year = rng.randrange(1900, 2100)
            return words.year_in_words(year), str(year), f"'{year % 100:02}"
        number = rng.randrange(1, 32 if kind == 2 else 100)
        if kind == 2:
            return words.ordinal(number), f"{number:02}", words.ordinal_digits(number)
        return words.cardinal(number), str(number), f"{number:02}"

    return table(rng, row, 2, [1, 2, 2])


def identifiers(rng: random.Random, pool: Sequence[str]) -> str:
    """The same words in every naming style; half of the words come from `pool`."""

    def row() -> Sequence[str]:
        parts: Sequence[str] = draw_words(rng)
        if rng.random() < 0.5:
            parts = [rng.choice(pool) for _ in range(rng.randint(1, 4))]
        if split_of("_".join(parts)) == "heldout":
            return row()
        return (
            *(style(parts) for style in STYLES.values()),
            " ".join(parts),
            " ".join(parts).title(),
        )

    return table(rng, row, len(STYLES) + 2, [1] * (len(STYLES) + 2))


# Every order of every choice of fields but one: the exact JSON of the task is never shown.
FIELDS = tuple(Person.__dataclass_fields__)
FIELD_ORDERS = tuple(
    order for size in (1, 2, 3, 4) for order in permutations(FIELDS, size) if order != FIELDS
)


def people(rng: random.Random) -> str:
    """People in sentences, as JSON, as settings, as comma-separated values."""
    fields = rng.choice(FIELD_ORDERS)
    forms = rng.sample(range(len(PERSON_SENTENCES)), len(PERSON_SENTENCES))

    def row() -> Sequence[str]:
        person = draw_person(rng)
        while split_of(person.name) == "heldout":
            person = draw_person(rng)
        facts = {field: getattr(person, field) for field in fields}
        return (
            *(person_sentence(person, form) for form in forms[:4]),
            json.dumps(facts),
            "; ".join(f"{field}: {value}" for field, value in facts.items()),
            ", ".join(str(value) for value in facts.values()),
            repr(facts),
        )

    return table(rng, row, 4, [1, 1, 1, 1, 6, 2, 2, 2])


def copies(rng: random.Random, pool: Sequence[str]) -> str:
    """Arbitrary words, digits and JSON records said twice."""
    kind = rng.randrange(3)

    def row() -> Sequence[str]:
        chosen = [rng.choice(pool) for _ in range(rng.randint(1, 6))]
        if kind == 0:
            return " ".join(chosen), " ".join(chosen).title()
        if kind == 1:
            # At most seven characters: too short to be a date in any notation.
            digits = "".join(rng.choice("0123456789-/.") for _ in range(rng.randint(2, 7)))
            return digits, digits
        record = {
            word: rng.choice([len(word), word.title(), rng.randrange(1000)]) for word in chosen
        }
        return json.dumps(record), "; ".join(f"{key}: {value}" for key, value in record.items())

    return table(rng, row, 2, [1, 1])


def document(rng: random.Random, pool: Sequence[str]) -> str:
    """One generated document; `pool` holds words to build identifiers from."""
    kind = rng.choices(
        ("dates", "numbers", "identifiers", "people", "copies"), (28, 7, 27, 28, 10)
    )[0]
    if kind == "identifiers":
        return identifiers(rng, pool)
    if kind == "copies":
        return copies(rng, pool)
    return {"dates": dates, "numbers": numbers, "people": people}[kind](rng)
