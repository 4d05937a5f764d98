"""What a config's fields may hold, and how their values stand in a file."""

from __future__ import annotations

import dataclasses
import re
import sys
import typing
from collections.abc import Iterable, Mapping
from enum import Enum
from functools import lru_cache
from numbers import Integral, Real
from types import UnionType
from typing import Any, TypeVar

from multigraft.errors import ConfigError, MultigraftError
from multigraft.expressions import slow

T = TypeVar("T")
FORMAT_VERSION = "0.21.2"
"""The PEFT release whose file format we write; readers compare it with their own version."""


LARGEST = {int: 2**63 - 1, float: sys.float_info.max}
"""Beyond these, arithmetic with a number of a config would fail, or take for ever."""


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
    """Raise `ConfigError` unless ``pattern`` is a regular expression that ends in good time."""
    try:
        re.compile(pattern)
        reason = slow(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        remedy = f"Where it is meant literally, write {re.escape(pattern)!r}."
        if field_name in ("target_modules", "exclude_modules"):
            remedy = f"To name modules, give a list: [{pattern!r}]."
        raise ConfigError(
            f"`{field_name}` (={pattern!r}) is read as a regular expression and is not one "
            f"({error}). {remedy}"
        ) from error
    if reason:
        raise ConfigError(
            f"`{field_name}` (={pattern!r}) is an expression that could take for ever: {reason}. "
            "Write it without a repetition in a repetition; a single `.*` is often enough."
        )


def built(config_class: type[T], values: Mapping[str, Any]) -> T:
    """A config from a file's values, which may be of any kind.

    Raises:
        ConfigError: a value is not of its field's type, or not what the class allows.
    """
    try:
        config = config_class(**values)
    except MultigraftError:
        raise
    except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as error:
        _refuse_misfits(config_class, values)
        raise ConfigError(
            f"{config_class.__name__}: a value cannot be used ({error}). Compare the config with "
            "one that saving writes."
        ) from error
    _refuse_misfits(config_class, {name: getattr(config, name) for name in values})
    return config


def _refuse_misfits(config_class: type, values: Mapping[str, Any]) -> None:
    hints = _hints(config_class)
    for name, value in values.items():
        if not fits(value, hints.get(name, Any)):
            kind = str(hints[name]).replace("typing.", "").replace("multigraft.config.", "")
            kind = hints[name].__name__ if isinstance(hints[name], type) else kind
            raise ConfigError(
                f"{config_class.__name__}: `{name}` (={value!r}) must be of the type {kind}."
            )


@lru_cache
def _hints(config_class: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(config_class)
    except NameError:  # a type that its file imports for type checkers alone
        return {}


def fits(value: Any, hint: Any) -> bool:
    """Whether a value from JSON, or what a config made of it, is of an annotated type."""
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, UnionType):
        return any(fits(value, each) for each in inner)
    if kind is typing.Literal:
        return value in inner
    if kind in (list, tuple, set, frozenset):
        return isinstance(value, (list, tuple, set, frozenset)) and _all_fit(value, kind, inner)
    if kind in (dict, Mapping):
        is_table = isinstance(value, Mapping)
        return is_table and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if hint is Any or not isinstance(hint, type):
        return True
    if issubclass(hint, Enum) or hint is str:
        return isinstance(value, (str, Enum))
    if hint in (int, float):
        is_number = isinstance(value, Integral if hint is int else Real)
        return is_number and not isinstance(value, bool) and abs(value) <= LARGEST[hint]
    if dataclasses.is_dataclass(hint):
        return isinstance(value, (hint, Mapping))
    return isinstance(value, hint)


def _all_fit(values: Iterable[Any], kind: type, inner: tuple[Any, ...]) -> bool:
    if kind is tuple and inner[-1] is not Ellipsis:
        values = list(values)
        pairs = zip(values, inner, strict=False)
        return len(values) == len(inner) and all(fits(v, hint) for v, hint in pairs)
    return all(fits(value, inner[0]) for value in values)


def is_newer(version: Any) -> bool:
    """Whether a file's version is above the one whose format we write."""
    numbers = [int(n) for n in re.findall(r"\d{1,9}", str(version)[:100])[:3]]
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
