"""The adapters that a run asks for: its list, or one, times every combination of a sweep."""

from __future__ import annotations

import itertools
from typing import Any

from multigraft.errors import ConfigError, did_you_mean
from multigraft.train.spec.keys import AdapterKeys, RunSpec

MOST = 256
"""Adapters that a sweep may come to."""
SHORT = 24
"""Letters of a value that go into an adapter's name."""


def expanded(run: RunSpec) -> list[AdapterKeys]:
    """The adapters with all their keys, in the order of the file.

    Raises:
        ConfigError: the sweep is over something that is no key of an adapter, or too large.
    """
    defaults = {
        key: getattr(run, key) for key in AdapterKeys.model_fields if key in run.model_fields_set
    }
    if run.adapters is None:
        given = [defaults]
    else:
        defaults.pop("name", None)
        given = [
            {**defaults, **{key: getattr(own, key) for key in own.model_fields_set}}
            for own in run.adapters
        ]
    if run.sweep:
        combinations = _combinations(run.sweep)
        if len(given) * len(combinations) > MOST:
            raise ConfigError(
                f"`sweep`: {len(given)} x {len(combinations)} adapters are more than {MOST}. Sweep "
                "over fewer values, or in several runs."
            )
        given = [
            {**own, **values, "name": _named(own.get("name", "default"), values, run.sweep)}
            for own in given
            for values in combinations
        ]
    return [_checked(values) for values in given]


def _combinations(sweep: dict[str, list[Any]]) -> list[dict[str, Any]]:
    for key, values in sweep.items():
        if key not in AdapterKeys.model_fields or key == "name":
            hint = did_you_mean(key, [name for name in AdapterKeys.model_fields if name != "name"])
            raise ConfigError(f"`sweep`: `{key}` is no key to sweep over.{hint}")
        if not values:
            raise ConfigError(f"`sweep`: `{key}` has no values. Give at least one.")
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise ConfigError(f"`sweep`: `{key}` has the value {twice!r} twice. Give it once.")
    return [dict(zip(sweep, each, strict=True)) for each in itertools.product(*sweep.values())]


def _named(name: str, values: dict[str, Any], sweep: dict[str, list[Any]]) -> str:
    """A name that says what sets the adapter apart: ``dates-rank8-lr0.0001``.

    Values that make no short name go by their number: ``config2``.
    """
    parts = [] if name == "default" else [name]
    for key, value in values.items():
        text = f"{value:g}" if isinstance(value, float) else str(value)
        plain = "".join(c if c.isalnum() or c in "._" else "_" for c in text).strip("._")
        is_short = isinstance(value, (str, int, float)) and 0 < len(plain) <= SHORT
        parts.append(f"{key}{plain if is_short else sweep[key].index(value) + 1}")
    return "-".join(parts)


def _checked(values: dict[str, Any]) -> AdapterKeys:
    from pydantic import ValidationError

    from multigraft.train.spec.read import told

    try:
        return AdapterKeys.model_validate(values)
    except ValidationError as error:
        raise ConfigError(told(error.errors(), "`sweep`: ")) from None
