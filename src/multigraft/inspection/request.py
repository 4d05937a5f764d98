"""A config from a method's name and fields: what a command line or a form gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from multigraft.config import CONFIGS, PeftConfig
from multigraft.errors import ConfigError, did_you_mean


def config_for(method: str, fields: Mapping[str, Any]) -> PeftConfig:
    """The config of a method with these fields; those that are None are left at their defaults.

    Args:
        method: its ``peft_type``, in any case.
        fields: by the config's names; ``rank`` is what the method calls ``r`` or ``init_r``.

    Raises:
        ConfigError: there is no such method, it has no such field, or a value is not allowed.
    """
    cls = CONFIGS[method.upper()]
    known = [item.name for item in dataclasses.fields(cls)]
    given = {name: value for name, value in fields.items() if value is not None}
    if "rank" in given:
        own = next((name for name in ("init_r", "r") if name in known), "rank")
        given[own] = given.pop("rank")
    for name in given:
        if name not in known:
            raise ConfigError(
                f"{cls.__name__}: there is no field `{name}`.{did_you_mean(name, known)}"
            )
    try:
        return cls(**given)
    except TypeError as error:  # a value of a type that the field's own check cannot read
        raise ConfigError(f"{cls.__name__}: {error}.") from error
