"""Values of options that say what to graft and where, from text."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import typer

from multigraft.train.spec import targets_of


def names_or_expression(values: Sequence[str] | None) -> list[str] | str | None:
    """A list where there are only names, and commas between them; else one expression."""
    if not values:
        return None
    if len(values) == 1:
        return targets_of(values[0])
    names: list[str] = []
    for value in values:
        own = targets_of(value)
        if not isinstance(own, list):
            raise typer.BadParameter(
                f"{', '.join(map(repr, values))}: an expression stands alone; give several names, "
                "or one expression."
            )
        names += own
    return names


def layers(value: str | None) -> list[int] | None:
    """Indices from ``0-3,7``."""
    if value is None:
        return None
    found: list[int] = []
    for part in value.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:\s*-\s*(\d{1,6}))?\s*", part)
        if match is None:
            raise typer.BadParameter(f"{value!r}: layers are numbers and ranges, as in 0-3,7.")
        first = int(match[1])
        found += range(first, int(match[2] or first) + 1)
    return found


def name_or_mapping(value: str) -> str | dict[str, Any]:
    """A name as it stands; a mapping where braces stand around it, as YAML or JSON."""
    if not value.lstrip().startswith("{"):
        return value
    import yaml

    try:
        found = yaml.safe_load(value)
    except yaml.YAMLError as error:
        first = str(error).splitlines()[0]
        raise typer.BadParameter(f"{value!r} is no mapping ({first}).") from error
    return dict(found)


def settings(values: Sequence[str] | None) -> dict[str, Any]:
    """Fields from ``name=value``, each value as JSON, or as text where it is none."""
    found: dict[str, Any] = {}
    for value in values or ():
        name, sign, text = value.partition("=")
        if not sign or not name:
            raise typer.BadParameter(f"{value!r} is not of the form name=value.")
        try:
            found[name] = json.loads(text)
        except (ValueError, RecursionError):
            found[name] = text
    return found
