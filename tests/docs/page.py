"""A page of docs/: its blocks, and running them from top to bottom as a reader would."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from multigraft import cli

DOCS = Path(__file__).resolve().parents[2] / "docs"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"`([^`\n]+)`")
NUMBER = re.compile(r"\d[\d,.]*")


def numbers(line: str) -> list[float]:
    """Every number in it."""
    return [float(text.replace(",", "").rstrip(".")) for text in NUMBER.findall(line)]


def pages() -> list[Path]:
    """Every page of the documentation, without the API's."""
    return sorted(DOCS.glob("*.md"))


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """(language, text) of the page's fenced blocks."""
    yield from BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))


def python(page: str) -> list[str]:
    """The page's Python, block by block."""
    return [text for language, text in blocks(page) if language == "python"]


def command(line: str) -> int | str | None:
    """Run ``$ multigraft …`` in this process; its exit code."""
    try:
        cli.main(shlex.split(line.removeprefix("$ "))[1:])
    except SystemExit as end:
        return end.code
    return None


def run(page: str, **names: Any) -> dict[str, Any]:
    """Run the page's Python, and its commands in between; returns the names it leaves behind."""
    found = {"__name__": "page", **names}
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text, page, "exec"), found)
        elif language == "console":
            for line in filter(lambda line: line.startswith("$ multigraft"), text.splitlines()):
                assert not command(line), line
    return found
