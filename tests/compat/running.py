"""Programs that import PEFT, run as they are with PEFT and under the alias.

A program prints what it found as one line of JSON. Each runs once in a session, whichever worker
asks for it first, with both libraries at a time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from filelock import FileLock

PROGRAMS = Path(__file__).parent / "programs"
MARK = "FACTS "
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
LIMIT = 240


class Facts(NamedTuple):
    """What a program found."""

    aliased: dict[str, Any]
    with_peft: dict[str, Any]


def facts_of(program: str, factory: pytest.TempPathFactory) -> Facts:
    """Run a program of `PROGRAMS` both ways, or read what it found when it was run."""
    shared = factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        shared = shared.parent
    kept = shared / f"facts-of-{program}.json"
    with FileLock(f"{kept}.lock"):
        if not kept.is_file():
            path = str(PROGRAMS / f"{program}.py")
            running = [start("-m", "multigraft.compat", path), start(path)]
            kept.write_text(json.dumps([told(each) for each in running]))
    return Facts(*json.loads(kept.read_text()))


def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """A fresh interpreter with these arguments."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **QUIET},
        **options,
    )


def output(*arguments: str, **options: Any) -> str:
    """What a fresh interpreter with these arguments prints; it must succeed."""
    running = start(*arguments, **options)
    out, err = running.communicate(timeout=LIMIT)
    assert running.returncode == 0, f"{arguments}\n{out[-2000:]}\n{err[-6000:]}"
    return out


def told(running: subprocess.Popen[str]) -> dict[str, Any]:
    """The facts that a program prints; it must succeed."""
    out, err = running.communicate(timeout=LIMIT)
    lines = [line for line in out.splitlines() if line.startswith(MARK)]
    assert running.returncode == 0 and lines, f"{running.args}\n{out[-2000:]}\n{err[-6000:]}"
    found: dict[str, Any] = json.loads(lines[-1].removeprefix(MARK))
    return found


def differences(facts: Facts) -> dict[str, tuple[Any, Any]]:
    """Where a program found something else under the alias than with PEFT, rounding aside.

    What begins with `beyond PEFT` is meant to be different.
    """
    found = {**facts.aliased, **facts.with_peft}
    names = [name for name in found if not name.startswith("beyond PEFT")]
    pairs = {name: (facts.aliased.get(name), facts.with_peft.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if not _alike(*pair)}


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return a == pytest.approx(b, abs=2e-3, rel=1e-4)
    return bool(a == b)
