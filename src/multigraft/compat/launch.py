"""Running a program under the alias, and the processes that it starts.

    python -m multigraft.compat train.py ──► alias, hooks ──► train.py as __main__
        multiprocessing: what a child is prepared with installs the alias as it is unpickled
        subprocess:      python X  becomes  python child.py X

No variable of the environment and no file of the interpreter's start-up is involved, so that
nothing is left behind and other programs are not touched. This file uses the standard library
alone: see `child`.
"""

from __future__ import annotations

import functools
import multiprocessing.spawn
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from .alias import Alias, install  # relative, so that `child` can load it by itself

USAGE = """\
usage: python -m multigraft.compat SCRIPT [ARGUMENT ...]
       python -m multigraft.compat -m MODULE [ARGUMENT ...]
       python -m multigraft.compat -c CODE [ARGUMENT ...]

Runs a Python program in which `import peft` finds Multigraft, PEFT installed or not."""

CHILD = Path(__file__).resolve().with_name("child.py")
WITH_VALUE = "WX"
"""Options of the interpreter that take a value, in the same word or in the next one."""
NO_PROGRAM = "hiSV?"
"""Options with which no program is run that could import anything."""


def main(arguments: Sequence[str]) -> None:
    """Install the alias here and for children, and run the program that the arguments name."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, file=sys.stderr if not arguments else sys.stdout)
        raise SystemExit(0 if arguments else 2)
    kind = arguments[0] if arguments[0] in ("-m", "-c") else ""
    if kind and len(arguments) < 2:
        print(f"{kind} names nothing to run.\n{USAGE}", file=sys.stderr)  # noqa: T201
        raise SystemExit(2)
    take_effect()
    program, *rest = arguments[1:] if kind else arguments
    sys.argv = [kind if kind == "-c" else program, *rest]
    RUNNERS[kind](program)


def take_effect() -> None:
    """Install the alias in this process and let it reach the children of it; once."""
    alias = install()
    if not alias.undo:
        _replace(alias, subprocess.Popen, "__init__", _starting)
        _replace(alias, multiprocessing.spawn, "get_preparation_data", _preparing)


def _replace(alias: Alias, owner: Any, name: str, around: Callable[[Any], Any]) -> None:
    original = getattr(owner, name)
    setattr(owner, name, around(original))
    alias.undo.append(lambda: setattr(owner, name, original))


def in_child(command: Sequence[Any]) -> list[Any]:
    """A command that runs Python, with the alias in it; any other one as it is."""
    words = list(command)
    if not words or not _is_this_python(words[0]):
        return words
    place = _program_at(words)
    is_ours = place is not None and "multigraft.compat" in words[place : place + 2]
    if place is None or is_ours or str(words[place]) == str(CHILD):
        return words
    word = str(words[place])
    if word.startswith("-") and word[-1] in "cm" and len(word) > 2:  # as in `-uc CODE`
        words[place : place + 1] = [word[:-1], f"-{word[-1]}"]
        place += 1
    return [*words[:place], str(CHILD), *words[place:]]


def _is_this_python(word: Any) -> bool:
    """Whether a command's first word is the interpreter of this very environment."""
    try:
        name = os.fsdecode(word)
    except TypeError:
        return False
    if name == sys.executable:
        return True
    found = shutil.which(name)
    # Environments share an interpreter by links to it: what tells them apart is the folder.
    return (
        found is not None
        and os.path.dirname(os.path.abspath(found)) == os.path.dirname(sys.executable)
        and os.path.realpath(found) == os.path.realpath(sys.executable)
    )


def _program_at(words: Sequence[Any]) -> int | None:
    """Where a Python command names its program: a path, ``-m`` or ``-c``; None without one."""
    place = 1
    while place < len(words):
        word = str(words[place])
        if not word.startswith("-"):
            return place
        if word == "-" or word[1] in NO_PROGRAM:
            return None
        if word.startswith("--"):
            place += 2 if word == "--check-hash-based-pycs" else 1
        elif word[1] in "cm":
            return place if len(word) == 2 and place + 1 < len(words) else None
        elif word[1] in WITH_VALUE:
            place += 2 if len(word) == 2 else 1
        elif word[-1] in "cm":
            return place if place + 1 < len(words) else None
        else:
            place += 1
    return None


def _starting(original: Callable[..., None]) -> Callable[..., None]:
    """`Popen.__init__` that puts the alias into Python commands."""

    @functools.wraps(original)
    def start(self: Any, args: Any, *more: Any, **options: Any) -> None:
        is_list = isinstance(args, (list, tuple))
        executable = options.get("executable", more[1] if len(more) > 1 else None)
        shell = options.get("shell", more[7] if len(more) > 7 else False)
        if is_list and not shell and executable is None:
            args = in_child(args)
        original(self, args, *more, **options)

    return start


def _preparing(original: Callable[[str], dict[str, Any]]) -> Callable[[str], dict[str, Any]]:
    """What a child of `multiprocessing` is prepared with, the alias included."""

    @functools.wraps(original)
    def prepare(name: str) -> dict[str, Any]:
        return {**original(name), "multigraft": _Notice()}

    return prepare


class _Notice:
    """Unpickling one installs the alias, before the child imports anything of the program."""

    def __reduce__(self) -> tuple[Any, ...]:
        return runpy.run_path, (str(CHILD), None, "_multigraft_spawned")


def _run_script(path: str) -> None:
    _first_path(str(Path(path).resolve().parent))
    runpy.run_path(path, run_name="__main__")


def _run_module(name: str) -> None:
    _first_path(os.getcwd())
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _run_code(code: str) -> None:
    _first_path("")
    main = sys.modules["__main__"] = ModuleType("__main__")
    exec(compile(code, "<string>", "exec"), main.__dict__)


RUNNERS = {"": _run_script, "-m": _run_module, "-c": _run_code}


def _first_path(folder: str) -> None:
    """Where the interpreter would look first, had it run the program itself."""
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = folder
