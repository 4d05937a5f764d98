"""Print docs/performance.md: the figures of bench/results, beside PEFT's and the frozen base's.

python docs/performance.py            # print it
python docs/performance.py --write    # write docs/performance.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("performance.md")
RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"
HEAD = """# Performance

Printed by `python docs/performance.py --write` from `bench/results/`. Every figure is the median of
a script in `bench/` that ran both libraries in turn on one machine; each section names its command,
the machine and the versions, and its file holds every sample. Ratios are best read on your own:
`make bench`, and `make bench-gpu` on a GPU. Which of the project's targets are met, which are not
and why is in [bench/README.md](../bench/README.md).

In short: what is done once for each adapter (attaching, loading, saving, deleting) costs time for
that adapter's own layers, however many others there are. A step with one LoRA costs what the
mathematics of it costs, a little less than PEFT's. Mixed batches are where the libraries differ
most. What depends on the base's own products, no library can leave out.
"""
NAMES = {
    "multigraft": "Multigraft",
    "multigraft, DoRA": "Multigraft",
    "peft": "PEFT",
    "peft, DoRA": "PEFT",
}


@dataclass(frozen=True)
class Section:
    """One table of the page.

    Args:
        title: its heading.
        name: the report in bench/results.
        keys: fields that name a row.
        fields: what is shown of each arm, a field to the words for it.
        arms: the field that tells arms apart.
        text: what there is to know before reading it.
        only: rows are shown that have these values.
        shown: arms, in order.
    """

    title: str
    name: str
    keys: Sequence[str]
    fields: dict[str, str]
    text: str
    arms: str = "library"
    only: tuple[str, Any] | None = None
    shown: Sequence[str] = ("multigraft", "peft")


SECTIONS = (
    Section(
        "Attaching",
        "attach-cpu-2-cores",
        ["model", "adapters"],
        {"total ms": "all, ms", "last, CPU ms": "the last, ms"},
        "`llama` has 56 layers to adapt, `wide` 3,500 small ones. In PEFT the last adapter "
        "costs more than the first, since each walks through the wrappers of those before it.",
        only=("memory", "fresh"),
    ),
    Section(
        "Files, and deleting",
        "load_save-cpu-2-cores",
        ["operation"],
        {"ms among 2": "ms among 2", "ms among 64": "ms among 64"},
        "One adapter among 2 and among 64. Saving here flushes to the disk before it renames "
        "the file into place, which PEFT's does not.",
    ),
    Section(
        "A training step",
        "step-cpu-2-cores",
        ["shape"],
        {"ms": "ms"},
        "One forward and backward with one active LoRA, batch x tokens.",
    ),
    Section(
        "Against the frozen base",
        "floor-cpu-2-cores",
        ["workload"],
        {"of the floor": "times"},
        "What an adapter adds: the time of the frozen base itself is 1. For training that is "
        "forward plus the gradient of the input.",
        arms="arm",
    ),
    Section(
        "DoRA",
        "dora-cpu-2-cores",
        ["shape"],
        {"times LoRA's": "times our LoRA's step"},
        "A step of DoRA. Its norm is taken once a step, so that large steps hide it and small "
        "ones do not; with dropout the base runs twice, in both libraries.",
        arms="arm",
        shown=("multigraft, DoRA", "peft, DoRA"),
    ),
    Section(
        "Merging",
        "merge-cpu-2-cores",
        ["model", "factors"],
        {
            "merge, CPU ms": "merge, ms",
            "unmerge, CPU ms": "unmerge, ms",
            "% changed after unmerge": "% of values changed after it",
        },
        "Into bfloat16 weights and out again. On small layers merging is no faster than PEFT's: "
        "the copy that makes unmerging exact is part of it.",
    ),
    Section(
        "Combining",
        "combine-cpu-2-cores",
        ["rule", "hidden"],
        {"CPU ms": "ms"},
        "Two adapters into one. `svd` decomposes the factors and never the dense product; "
        "`ties_svd` needs that product in both.",
    ),
    Section(
        "Importing",
        "import_time-cpu-2-cores",
        ["after"],
        {"ms": "ms", "modules": "modules"},
        "What the import costs beyond what is imported already.",
    ),
    Section(
        "On a GPU",
        "gpu-nvidia-h200",
        ["workload"],
        {"of_floor": "times the frozen base's", "GiB": "GiB"},
        "An 8-layer Llama of hidden size 4096 in bfloat16, rank 16 on all linear layers. Rows "
        "that are bound by launching kernels (eager decoding, few tokens) are bound by the "
        "host, and move by a quarter between runs; captured in a CUDA graph they are not. An "
        "empty cell was not measured, or cannot be run.",
        arms="arm",
    ),
)


def number(value: Any) -> str:
    """A median, or a value, to three digits."""
    if isinstance(value, dict):
        value = value["median"]
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(section: Section, rows: list[dict[str, Any]]) -> list[str]:
    """A line for each key, a column for each arm's field."""
    found: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if section.only is None or row[section.only[0]] == section.only[1]:
            key = tuple(str(row[name]) for name in section.keys)
            found.setdefault(key, {})[row[section.arms]] = row
    columns = [(arm, field) for field in section.fields for arm in section.shown]
    heads = [f"{NAMES.get(arm, arm)}, {section.fields[field]}" for arm, field in columns]
    lines = [
        f"| {' | '.join([*section.keys, *heads])} |",
        f"| {' | '.join(['---', *['---'] * (len(section.keys) - 1), *['---:'] * len(heads)])} |",
    ]
    for key, arms in found.items():
        cells = [number(arms.get(arm, {}).get(field)) for arm, field in columns]
        lines.append(f"| {' | '.join([*key, *cells])} |")
    return lines


def origin(section: Section, report: dict[str, Any]) -> list[str]:
    """Where the figures come from."""
    hardware = report["hardware"]
    machine = hardware.get("gpus") or f"{hardware['cpu']}, {hardware['cores']} cores"
    versions = report["versions"]
    link = f"[every column and quartile](../bench/results/{section.name}.md)"
    return [
        f"- `{report['command']}`, {report['when'][:10]}: {link}",
        f"- {machine}; {threads(hardware)}; torch {versions['torch']}, PEFT {versions['peft']}",
    ]


def threads(hardware: dict[str, Any]) -> str:
    """How many there were."""
    return "1 thread" if hardware["threads"] == 1 else f"{hardware['threads']} threads"


def page() -> str:
    """The whole page."""
    parts = [HEAD.strip()]
    for section in SECTIONS:
        report = json.loads((RESULTS / f"{section.name}.json").read_text(encoding="utf-8"))
        parts += [
            f"## {section.title}",
            wrapped(section.text),
            "\n".join(table(section, report["rows"])),
            "\n".join(origin(section, report)),
        ]
    return "\n\n".join(parts) + "\n"


def wrapped(text: str) -> str:
    """Prose in lines of at most 100 characters."""
    import textwrap

    return "\n".join(textwrap.wrap(text, 100, break_on_hyphens=False))


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page())
