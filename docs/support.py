"""Print docs/support.md: which method acts on which layer in which storage, here and in PEFT.

    python docs/support.py            # print it
    python docs/support.py --write    # write docs/support.md

Every cell is tried: an adapter is attached, run, merged and run again on a small layer.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import peft
import torch

from multigraft import MultigraftError
from tests.contracts.laws import attach, batch, is_supported
from tests.contracts.oracle import Support, support
from tests.contracts.pairs import GEOMETRY_CASES, STORAGES, Pair, pairs, rows

PAGE = Path(__file__).with_name("support.md")
HEAD = """# What acts on what

Printed by `python docs/support.py --write`; a test holds the page to what is found. Each cell is
tried on a small layer: *Multigraft* / *PEFT {version}*.

- **yes**: attaches, trains and merges
- **runs**: attaches and trains; merging is refused, fails, or changes the output beyond rounding
- **-**: refused, or fails

Every pair that Multigraft supports passes all laws of the contract suite, and agrees with PEFT
wherever PEFT supports it (`tests/test_contracts.py`, `tests/test_contracts_peft.py`).
"""
NAMES = {"BIAS": "LoRA's `bias`", "SAVED_MODULE": "`modules_to_save`"}


@torch.no_grad()
def ours(pair: Pair) -> Support:
    """What Multigraft does with a pair."""
    if not is_supported(pair):
        return Support(False, False)
    model = attach(pair)
    model(batch(pair))
    try:
        model.merge_adapter()
        model(batch(pair))
    except MultigraftError:
        return Support(True, False)
    return Support(True, True)


def word(found: Support) -> str:
    """A cell's half."""
    return "yes" if found.merges else "runs" if found.adapts else "-"


def table(title: str, cells: Iterable[Pair], columns: list[str], of: str) -> str:
    """One table, a row a method."""
    rows: dict[str, dict[str, str]] = {}
    for pair in cells:
        both = f"{word(ours(pair))} / {word(support(pair))}"
        rows.setdefault(label(pair), {})[getattr(pair, of)] = both
    lines = [f"## {title}", "", "| | " + " | ".join(columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    lines += [
        f"| {n} | " + " | ".join(row.get(c, "- / -") for c in columns) + " |"
        for n, row in rows.items()
    ]
    return "\n".join(lines) + "\n"


def is_first(pair: Pair) -> bool:
    """Whether these are the first of the method's options that the suite runs with."""
    return pair.options == next(rows(pair.method))[1]


def label(pair: Pair) -> str:
    """A row's name: the method, and the option that makes it another one."""
    options = [f"`{name}`" for name in pair.options if name == "use_dora"]
    return " ".join([NAMES.get(pair.method, pair.method), *options])


def page() -> str:
    """The whole page."""
    chosen = [p for p in pairs() if is_first(p) or p.options == {"use_dora": True}]
    dense = [p for p in chosen if p.storage == "float32"]
    linear = [p for p in chosen if p.geometry == "linear"]
    return "\n".join(
        (
            HEAD.format(version=peft.__version__),
            table("Kinds of layers", dense, list(GEOMETRY_CASES), "geometry"),
            table("Storages of a linear layer", linear, list(STORAGES), "storage"),
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Print or write docs/support.md.")
    parser.add_argument("--write", action="store_true", help="write the page beside this script")
    write = parser.parse_args().write
    warnings.simplefilter("ignore")
    text = page()
    if write:
        PAGE.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
