"""The contract of a format: which keys a row has, and what record it makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from multigraft.errors import did_you_mean
from multigraft.registry import Registry
from multigraft.train.records import LANGUAGE, Record, Refusal

Values = Mapping[str, Any]
Kinds = tuple[type[Record], ...]


@dataclass(frozen=True)
class Format:
    """A way in which people write examples.

    Args:
        name: as ``--format`` gives it.
        keys: what every row of this format has.
        read: makes a record of a row that has them, or raises `Refusal`.
        example: a row, as JSON.
        makes: kinds of records that ``read`` gives.
        also: other sets of keys under which data sets have the same; ``read`` knows them too.
    """

    name: str
    keys: tuple[str, ...]
    read: Callable[[Values, int], Record]
    example: str
    makes: Kinds = LANGUAGE
    also: tuple[tuple[str, ...], ...] = ()

    def fits(self, row: Values) -> bool:
        """Whether a row has all keys that one of this format has."""
        return any(all(key in row for key in keys) for keys in (self.keys, *self.also))


FORMATS: Registry[Format] = Registry("format")


def text_of(row: Values, key: str) -> str:
    """The string under ``key``.

    Raises:
        Refusal: it is missing or no string.
    """
    if not isinstance(row[key], str):
        raise Refusal(f"`{key}` is {kind(row[key])}, not a string", "Put it in quotes")
    return str(row[key])


def optional_text(row: Values, key: str) -> str:
    """The string under ``key``, empty where there is none."""
    return "" if row.get(key) is None else text_of(row, key)


def learnable(row: Values, key: str) -> str:
    """The string under ``key``, which is what is learned.

    Raises:
        Refusal: there is nothing in it.
    """
    text = text_of(row, key)
    if not text.strip():
        raise Refusal(f"`{key}` is empty, so there is nothing to learn", "Drop the line")
    return text


def require(row: Values, wanted: Format) -> None:
    """Fail when a row lacks one of the format's keys.

    Raises:
        Refusal: with the nearest key that there is.
    """
    for key in () if wanted.fits(row) else wanted.keys:
        if key not in row:
            hint = did_you_mean(key, row) or f" Its keys are {', '.join(f'`{k}`' for k in row)}."
            needs = " and ".join(f"`{k}`" for k in wanted.keys)
            remedy = f"A line of the format `{wanted.name}` needs {needs}"
            raise Refusal(f"`{key}` is missing", f"{remedy}.{hint if row else ''}".rstrip("."))


def nested(value: Any) -> Any:
    """A list as it stands; the JSON of one, as tables hold it, is read."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def kind(value: Any) -> str:
    """What a value is, for messages: ``a number``, ``null``, …"""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else kinds.get(type(value), "a number")
