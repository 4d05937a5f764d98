"""Type checkers see the public API: `uses.py` passes `mypy --strict`, `mistakes.py` is refused.

Checked as a user's own scripts are: with none of this project's settings.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import multigraft

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FOUND = re.compile(r"^.*mistakes\.py:(\d+): error: .*\[([\w-]+)\]$", re.MULTILINE)
MARKED = re.compile(r"# refused: ([\w-]+)$")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def said() -> str:
    """What mypy says of both scripts; one run, since reading torch is most of it."""
    pytest.importorskip("mypy")
    cache = ROOT / ".mypy_cache" / "as_a_user"
    command = ["--strict", "--config-file=", f"--cache-dir={cache}", "--no-error-summary"]
    scripts = [str(HERE / name) for name in ("uses.py", "mistakes.py")]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *command, *scripts],
        cwd=HERE,  # away from pyproject.toml
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return done.stdout


def test_a_typed_script_is_accepted(said: str) -> None:
    assert [line for line in said.splitlines() if "mistakes.py" not in line] == []


def test_mistakes_are_refused_and_nothing_else(said: str) -> None:
    lines = (HERE / "mistakes.py").read_text(encoding="utf-8").splitlines()
    marks = ((number, MARKED.search(line)) for number, line in enumerate(lines, start=1))
    expected = {(number, mark[1]) for number, mark in marks if mark}
    assert len(expected) > 15
    assert {(int(line), code) for line, code in FOUND.findall(said)} == expected


def test_the_script_names_everything_that_is_public() -> None:
    tree = ast.parse((HERE / "uses.py").read_text(encoding="utf-8"))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert [name for name in multigraft.__all__ if name not in used] == []
