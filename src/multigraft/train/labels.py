"""Labels: the names of classes, found in data or given, and which of them a value means."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from multigraft.errors import ConfigError, DataError, did_you_mean, listed
from multigraft.train.records import Label, Refusal


def names_in(values: Iterable[Label]) -> tuple[str, ...]:
    """The names of all classes among these, in an order that depends on them alone.

    Numbers stand in their order, and other names in that of the alphabet.

    Raises:
        DataError: there are fewer than two, so that there is nothing to tell apart.
    """
    found = {name_of(value) for value in values}
    if len(found) < 2:
        only = f"only the label {next(iter(found))!r}" if found else "no label"
        raise DataError(
            f"the data has {only}, so there is nothing to tell apart. Give examples of every "
            "class, or name all of them in the task's `labels`."
        )
    is_counted = all(name.isdecimal() for name in found)
    return tuple(sorted(found, key=int) if is_counted else sorted(found))


def class_of(value: Label, names: Sequence[str]) -> int:
    """The number of the class that a value means: by its name, or by its number.

    Raises:
        Refusal: there is no such class.
    """
    name = name_of(value)
    if name in names:
        return names.index(name)
    if name.isdecimal() and int(name) < len(names):
        return int(name)
    known = f"Known: {listed(list(names))}"
    remedy = f"{known}.{did_you_mean(name, names)}".rstrip(".")
    raise Refusal(f"the label {value!r} is unknown", remedy)


def name_of(value: Label) -> str:
    """The name that a value is; a whole number has no fraction, as tables give it."""
    is_whole = isinstance(value, float) and value.is_integer()
    return str(int(value) if is_whole else value)


def check_names(names: object, task: str) -> None:
    """Fail when these are no names of classes.

    Raises:
        ConfigError: they are not strings, or one comes twice.
    """
    if not isinstance(names, tuple) or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(
            f"task `{task}`: `labels` (={names!r}) must be a list of names, as [no, yes] in quotes."
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"task `{task}`: `labels` names {listed(twice)} more than once.")


def require_names(names: Sequence[str], task: str) -> Sequence[str]:
    """The names themselves.

    Raises:
        ConfigError: there are none yet.
    """
    if not names:
        raise ConfigError(
            f"task `{task}`: its labels are not known yet. Give `labels`, or call settled() with "
            "the records first."
        )
    return names
