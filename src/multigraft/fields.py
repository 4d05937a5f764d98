"""What a config's fields may hold, and how their values stand in a file."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

from multigraft.errors import ConfigError

FORMAT_VERSION = "0.21.2"
"""The PEFT release whose file format we write; readers compare it with their own version."""


def name_list(field_name: str, value: Any) -> Any:
    """A list of strings in a stable order, a string, or None."""
    if value is None or isinstance(value, str):
        return value
    is_list = isinstance(value, Iterable) and not isinstance(value, Mapping)
    names = list(value) if is_list else None
    if names is None or not all(isinstance(n, str) and n for n in names):
        raise ConfigError(
            f"`{field_name}` (={value!r}) must be a list of non-empty strings, or a string."
        )
    return sorted(set(names)) if isinstance(value, (set, frozenset)) else list(dict.fromkeys(names))


def check_indices(value: Any) -> None:
    """Raise `ConfigError` unless ``layers_to_transform`` holds indices."""
    indices = value if isinstance(value, (list, tuple, set)) else [] if value is None else [value]
    for index in indices:
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
            raise ConfigError(
                f"`layers_to_transform` (={value!r}) must hold indices of layers: integers from 0."
            )


def check_ranges(name: str, value: Any) -> list[list[int]] | None:
    """Pairs of a first index and the one after the last, as lists; None for none.

    Raises:
        ConfigError: it is something else.
    """
    if not value:
        return None
    is_list = isinstance(value, (list, tuple))
    pairs = [list(p) if isinstance(p, (list, tuple)) else [p] for p in value] if is_list else []
    for pair in pairs or [[]]:
        are_integers = all(isinstance(n, int) and not isinstance(n, bool) for n in pair)
        if len(pair) != 2 or not are_integers or not 0 <= pair[0] < pair[1]:
            raise ConfigError(
                f"`{name}` (={value!r}) must be a list of pairs [first layer, layer after the "
                "last], such as [[0, 4], [2, 5]]."
            )
    return pairs


def check_regex(field_name: str, pattern: str) -> None:
    """Raise `ConfigError` unless ``pattern`` is a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        remedy = f"Where it is meant literally, write {re.escape(pattern)!r}."
        if field_name in ("target_modules", "exclude_modules"):
            remedy = f"To name modules, give a list: [{pattern!r}]."
        raise ConfigError(
            f"`{field_name}` (={pattern!r}) is read as a regular expression and is not one "
            f"({error}). {remedy}"
        ) from error


def is_newer(version: Any) -> bool:
    """Whether a file's version is above the one whose format we write."""
    numbers = [int(n) for n in re.findall(r"\d+", str(version))[:3]]
    return numbers > [int(n) for n in FORMAT_VERSION.split(".")]


def is_unset(value: Any, neutral: Any) -> bool:
    """Whether an option is off; a table of flags (or an object of them) is, when none is set."""
    if not value or value == neutral:
        return True
    flags = plain(value) if isinstance(neutral, Mapping) and neutral else None
    return isinstance(flags, Mapping) and not any(flags.values())


def plain(value: Any) -> Any:
    """The value as JSON has it: enums, sets and dataclasses are turned into what they hold."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {k: plain(v) for k, v in dataclasses.asdict(value).items()}
    return value
