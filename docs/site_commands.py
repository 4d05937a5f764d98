"""The list of verbs and options, read from the command line itself when the site is built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

MARKER = "<!-- every verb -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The verbs in the marker's place."""
    if MARKER not in markdown:
        return markdown
    import typer.main

    from multigraft.cli.app import app

    return markdown.replace(MARKER, "\n\n".join(verbs(typer.main.get_command(app))))


def verbs(group: Any) -> Iterator[str]:
    """A section for each verb."""
    for name, command in group.commands.items():
        yield f"## {name}"
        yield from (part.strip() for part in (command.help or "").split("\n\n"))
        rows = [option(parameter) for parameter in command.params if not parameter.hidden]
        yield "\n".join(["| option | what it means | default |", "| --- | --- | --- |", *rows])


def option(parameter: Any) -> str:
    """A row: how it is written, what it means, what it is otherwise."""
    names = [*parameter.opts, *parameter.secondary_opts]
    if parameter.param_type_name == "argument":
        names = [parameter.metavar or parameter.name.upper()]
    text = getattr(parameter, "help", None) or ""
    default = "" if parameter.required else shown(parameter.default)
    if parameter.required and parameter.param_type_name == "option":
        default = "required"
    written = ", ".join(f"`{name}`" for name in names)
    return f"| {written} | {cell(text)} | {cell(default)} |"


def shown(default: Any) -> str:
    """A default as one would write it; nothing for switches and for none."""
    return "" if isinstance(default, bool) or default in (None, (), [], "") else f"`{default}`"


def cell(text: str) -> str:
    """Text in a table, on one line."""
    return " ".join(text.replace("|", "\\|").split())
