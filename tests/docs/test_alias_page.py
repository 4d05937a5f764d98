"""docs/alias.md: its Python runs from top to bottom, and its last command runs a program."""

from __future__ import annotations

import re

from multigraft.compat.tables import MODULES
from tests.compat.running import output
from tests.docs import page

NAME = "alias.md"


def run(name: str) -> None:
    """Its Python, in an interpreter that has not looked for PEFT yet."""
    parts = page.python(name)
    assert len(parts) == 2
    output("-c", "\n".join(parts))


def test_its_python_runs() -> None:
    run("alias.md")


def test_its_last_command_runs() -> None:
    (commands,) = [text for language, text in page.blocks(NAME) if language == "bash"]
    *others, last = commands.splitlines()
    assert all(line.startswith("python -m multigraft.compat ") for line in others)
    code = last.removeprefix('python -m multigraft.compat -c "').removesuffix('"')
    assert "multigraft.methods.lora" in output("-m", "multigraft.compat", "-c", code)


def test_the_modules_that_it_names_are_there() -> None:
    text = (page.DOCS / NAME).read_text(encoding="utf-8")
    (listed,) = re.findall(r"`peft` has every public name(.*?)have what other packages", text, re.S)
    named = re.findall(r"`(?:peft)?(\.[\w.]+)`", listed)
    inside = {".other", ".hotswap", ".save_and_load"}
    assert len(named) > 10
    for name in named:
        assert f"peft{'.utils' if name in inside else ''}{name}" in MODULES, name
