"""A benchmark's results with what produced them: versions, hardware, command.

    report = Report("import_time", "Seconds that an import adds.")
    report.row(package="multigraft", seconds=[0.11, 0.10, 0.12])
    report.write()

A list of numbers is a column's samples: the report shows their median and quartiles and keeps them
all. `write` leaves `<name>-<machine>.json` and `.md` in bench/results/ and prints the second.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PACKAGES = (
    *("multigraft", "torch", "peft", "transformers", "accelerate", "safetensors"),
    *("triton", "bitsandbytes", "torchao"),
)


class Report:
    """Rows of one benchmark; see the module's docstring."""

    def __init__(self, name: str, about: str = "", command: str = ""):
        self.name = name
        self.about = about.strip()
        self.command = command or own_command()
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def row(self, **columns: Any) -> Report:
        """Adds a row. A list or tuple of numbers becomes its `summary`."""
        self.rows.append(
            {
                name: summary(value) if isinstance(value, (list, tuple)) else value
                for name, value in columns.items()
            }
        )
        return self

    def note(self, text: str) -> Report:
        """Adds a sentence below the table: what limits the numbers."""
        self.notes.append(text)
        return self

    def write(self, folder: Path = RESULTS) -> Path:
        """Writes both files, prints the readable one, and returns the path of the JSON."""
        folder.mkdir(parents=True, exist_ok=True)
        facts = {
            "name": self.name,
            "about": self.about,
            "command": self.command,
            "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": commit(),
            "versions": versions(),
            "hardware": hardware(),
            "notes": self.notes,
        }
        path = folder / f"{self.name}-{machine()}.json"
        path.write_text(json.dumps({**facts, "rows": self.rows}, indent=1) + "\n")
        text = self._markdown(facts)
        path.with_suffix(".md").write_text(text)
        print(text, end="")
        return path

    def _markdown(self, facts: dict[str, Any]) -> str:
        parts = [f"# {self.name}", self.about, self._table()]
        parts += self.notes
        parts.append(
            "\n".join(
                [
                    f"- command: `{self.command}`",
                    f"- when: {facts['when']}, commit {facts['commit']}",
                    f"- versions: {_listed(facts['versions'])}",
                    f"- hardware: {_listed(facts['hardware'])}",
                ]
            )
        )
        return "\n\n".join(part for part in parts if part) + "\n"

    def _table(self) -> str:
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        body = [[_cell(row.get(name, "")) for name in names] for row in self.rows]
        lines = [names, ["---"] * len(names), *body]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles of `samples`, and the samples."""
    if len(samples) == 1:
        low = high = samples[0]
    else:
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    middle = statistics.median(samples)
    return {"median": middle, "low": low, "high": high, "samples": list(samples)}


def own_command() -> str:
    """The running script and its arguments, relative to the repository."""
    script = Path(sys.argv[0]).resolve()
    if script.is_relative_to(ROOT):
        script = script.relative_to(ROOT)
    return shlex.join(["python", script.as_posix(), *sys.argv[1:]])


def commit() -> str:
    """The checkout's commit, with `+changes` where tracked source files differ from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "src", "bench/*.py")
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Python, and those of PACKAGES that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> str:
    """The machine's class, as part of a file's name: its GPU, or the number of its cores."""
    import torch

    if torch.cuda.is_available():
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return f"cpu-{_cores()}-cores"


def hardware() -> dict[str, Any]:
    """Processor, cores this process may use, memory, threads of torch, GPUs."""
    import torch

    facts: dict[str, Any] = {"cpu": _cpu(), "cores": _cores(), "memory": _memory()}
    facts["threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        facts["gpus"] = ", ".join(
            torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
        )
        facts["cuda"] = torch.version.cuda
    return facts


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> str:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return "unknown"
    return f"{size / 2**30:.0f} GiB"


def _cell(value: Any) -> str:
    if isinstance(value, dict) and "median" in value:
        return f"{_cell(value['median'])} ({_cell(value['low'])} – {_cell(value['high'])})"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "\\|")


def _listed(facts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())
