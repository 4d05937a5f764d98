"""Commands in the documentation: each names a verb that there is, with options that it has."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from multigraft.cli.app import app
from tests.docs import page

ROOT = page.DOCS.parent
PAGES = [*ROOT.glob("*.md"), *page.DOCS.rglob("*.md"), ROOT / "demo" / "README.md"]
IN_BLOCK = re.compile(
    r"^\s*(?:\$ )?(?:[A-Z_]+=\S+ )*(?:[^\n|]*(?:\||-m) )?multigraft ([a-z].*(?:\\\n.*)*)",
    re.MULTILINE,
)
IN_TEXT = re.compile(r"^multigraft ([a-z].*)")


def verbs() -> dict[str, set[str]]:
    """The options of each verb, by its name; those of a verb of a group are its own."""
    found = {}

    def add(command: object, path: str) -> None:
        for name, inner in getattr(command, "commands", {}).items():
            add(inner, f"{path} {name}".strip())
        options = [[*p.opts, *p.secondary_opts] for p in command.params]  # type: ignore[attr-defined]
        names = {name for each in options for name in each if name.startswith("-")}
        found[path] = names | {"--help", "-h"}

    add(typer.main.get_command(app), "")
    return found


VERBS = verbs()


def commands(text: str) -> Iterator[str]:
    """What stands behind `multigraft` in blocks that are no Python, and in code spans."""
    for language, block in page.BLOCK.findall(text):
        if language not in ("python", "json", "yaml"):
            yield from (line.replace("\\\n", " ") for line in IN_BLOCK.findall(block))
    for span in page.CODE.findall(page.BLOCK.sub("", text)):
        if match := IN_TEXT.match(span):
            yield match[1]


def faults(command: str) -> Iterator[str]:
    """What is wrong with one command."""
    words = shlex.split(command.partition(" # ")[0])
    verb = words[0]
    while len(words) > 1 and f"{verb} {words[1]}" in VERBS:
        verb, words = f"{verb} {words[1]}", words[1:]
    if verb not in VERBS:
        yield f"`multigraft {command}`: there is no verb `{verb}`"
        return
    for word in words[1:]:
        option = word.lstrip("[").rstrip("].,").partition("=")[0]
        if re.match(r"--?[a-z]", option) and option not in VERBS[verb]:
            yield f"`multigraft {command}`: `{verb}` has no option `{option}`"


@pytest.mark.parametrize("where", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_are_of_the_command_line(where: Path) -> None:
    text = where.read_text(encoding="utf-8")
    assert [fault for command in commands(text) for fault in faults(command)] == []


@pytest.mark.parametrize("where", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_options_that_stand_alone_are_of_some_verb(where: Path) -> None:
    spans = page.CODE.findall(page.BLOCK.sub("", where.read_text(encoding="utf-8")))
    options = [re.split("[ =]", span)[0] for span in spans if span.startswith("--")]
    known = set().union(*VERBS.values())
    assert [option for option in options if option not in known] == []


def test_there_is_something_to_check() -> None:
    found = [c for where in PAGES for c in commands(where.read_text(encoding="utf-8"))]
    named = {command.split()[0] for command in found}
    assert len(found) > 30
    assert {"quickstart", "train", "doctor", "export", "convert", "targets", "diff"} <= named


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("trian --model M", "no verb `trian`"),
        ("train --model M --dat F", "`train` has no option `--dat`"),
        ("doctor A [--bas M]", "`doctor` has no option `--bas`"),
    ],
)
def test_a_wrong_command_is_found(command: str, said: str) -> None:
    (fault,) = faults(command)
    assert said in fault
