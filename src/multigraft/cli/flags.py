"""Flags from a schema: one for every key, with the key's own description."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from multigraft.cli.spec import name_or_mapping, settings
from multigraft.train.spec.read import values_of

SHORT = {"output": "-o", "rank": "-r"}


def with_flags(schema: type[BaseModel], function: Callable[..., None]) -> Callable[..., None]:
    """The function as a command whose keyword ``flags`` has a flag for every key of the schema.

    What is not given on the command line is None.
    """
    own = [p for p in inspect.signature(function).parameters.values() if p.name != "flags"]
    made = [_parameter(name, field) for name, field in schema.model_fields.items()]

    def command(**given: Any) -> None:
        flags = {name: given.pop(name) for name in schema.model_fields}
        function(**given, flags=flags)

    hints = inspect.get_annotations(function, eval_str=True)
    own = [p.replace(kind=p.KEYWORD_ONLY, annotation=hints[p.name]) for p in own]
    command.__annotations__ = {p.name: p.annotation for p in (*own, *made)}
    command.__name__, command.__doc__ = function.__name__, function.__doc__
    # An attribute that inspect looks for and typeshed does not know.
    command.__signature__ = inspect.Signature([*own, *made])  # type: ignore[attr-defined]
    return command


def given(schema: type[BaseModel], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the flags that were given, as the schema takes them."""
    values = {name: value for name, value in flags.items() if value not in (None, [])}
    return {name: _value(name, schema.model_fields[name], v) for name, v in values.items()}


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    kind = _kind(field)
    flag = f"--{name.replace('_', '-')}"
    if kind is bool:
        flag = f"{flag}/--no-{name.replace('_', '-')}"
    names = [flag, *([SHORT[name]] if name in SHORT else [])]
    option = typer.Option(*names, help=_help(field), show_default=False)
    shape: Any = list[str] if kind is dict else kind
    hint = Annotated[Union[shape, None], option]  # noqa: UP007 - not known before it runs
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint)


def _kind(field: FieldInfo) -> Any:
    """The type of a flag's value: the first of a union; text for choices and lists."""
    kind = field.annotation
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(each for each in get_args(kind) if each is not type(None))
    origin = get_origin(kind)
    if origin is dict:
        return dict
    return str if origin in (list, Literal) else kind


def _may_be_mapping(field: FieldInfo) -> bool:
    return any(get_origin(each) is dict for each in get_args(field.annotation))


def _help(field: FieldInfo) -> str:
    text = field.description or ""
    default = field.default
    if field.is_required() or default in (None, False) or "[default" in text:
        return text
    return text if field.default_factory is not None else f"{text} [default: {default}]"


def _value(name: str, field: FieldInfo, value: Any) -> Any:
    if isinstance(value, list):
        return settings(value)
    if _may_be_mapping(field):
        return name_or_mapping(value)
    if name == "adapters":
        return values_of(value, "--adapters")
    if get_origin(field.annotation) is list:
        return [part.strip() for part in value.split(",")]
    return value
