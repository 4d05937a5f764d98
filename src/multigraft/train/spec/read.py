"""From a file and flags to a `RunSpec`; a mistake is told with its place and the nearest key."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from multigraft.errors import ConfigError, MissingExtraError, did_you_mean
from multigraft.train.spec.keys import AdapterKeys, AdapterSpec, RunSpec

SHOWN = 5
"""How many mistakes a message names."""


def read_run(
    path: str | os.PathLike[str] | None, flags: Mapping[str, Any] | None = None
) -> RunSpec:
    """The run that a file and flags ask for; a flag wins over the file, for every adapter.

    Args:
        path: a YAML file; None for flags alone.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or a value is of the wrong type.
    """
    values = {} if path is None else _yaml(Path(path))
    return run_of(values, flags or {}, where="" if path is None else f"{os.fspath(path)}: ")


def run_of(
    values: Mapping[str, Any], flags: Mapping[str, Any] | None = None, *, where: str = ""
) -> RunSpec:
    """The same from values as YAML holds them."""
    from pydantic import ValidationError

    flags = dict(flags or {})
    merged = {**values, **flags}
    own = {key: value for key, value in flags.items() if key in AdapterKeys.model_fields}
    if isinstance(values.get("adapters"), list) and "adapters" not in flags:
        own.pop("name", None)
        merged["adapters"] = [
            {**each, **own} if isinstance(each, dict) else each for each in values["adapters"]
        ]
    try:
        return RunSpec.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(told(error.errors(), where)) from None


def _yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: the file cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: this is no YAML ({error}).") from error
    values = values_of(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: a run is keys and values, as `model: …` and `data: …`; this is "
            f"{type(values).__name__}."
        )
    return values


def values_of(text: str, where: str) -> Any:
    """What YAML says, read as a run's file is.

    Raises:
        ConfigError: it is none.
        MissingExtraError: pyyaml is not installed.
    """
    try:
        import yaml
    except ImportError as error:
        raise MissingExtraError("run files need pyyaml: pip install 'multigraft[train]'") from error
    try:
        return yaml.load(text, Loader=_loader(yaml))
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        why = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{where}{line}: this is no YAML ({why}).") from error


def _loader(yaml: Any) -> Any:
    """YAML's safe loader, to which 1e-4 is a number and a key given twice is a mistake."""

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value]
            twice = next((key for key in keys if keys.count(key) > 1), None)
            if twice is not None:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key `{twice}` is given twice", node.start_mark
                )
            return super().construct_mapping(node, deep)

    number = re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    return Loader


def told(errors: Sequence[Mapping[str, Any]], where: str) -> str:
    """Pydantic's errors as one message."""
    lines = [_line(error) for error in errors]
    more = f" (and {len(lines) - SHOWN} more)" if len(lines) > SHOWN else ""
    return where + " ".join(dict.fromkeys(lines[:SHOWN])) + more


def _line(error: Mapping[str, Any]) -> str:
    place = _place(error["loc"])
    if error["type"] == "extra_forbidden":
        inside = error["loc"][0] == "adapters" and len(error["loc"]) > 1
        known = (AdapterSpec if inside else RunSpec).model_fields
        name = str(error["loc"][-1])
        hint = did_you_mean(name, known)
        if inside and name in RunSpec.model_fields:
            hint = " It is a key of the whole run: give it at the top."
        return f"`{place}` is no key of a run.{hint}"
    if error["type"] == "missing":
        flag = f"give --{place} or " if place in RunSpec.model_fields else ""
        return f"`{place}` is missing: {flag}write `{place}: …` in the run's file."
    value = error.get("input")
    return f"`{place}` (={value!r}): {error['msg'][:1].lower()}{error['msg'][1:]}."


def _place(loc: Sequence[Any]) -> str:
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part not in ("str", "list[str]", "dict[str,any]"):  # branches of a union
            text += f".{part}" if text else str(part)
    return text
