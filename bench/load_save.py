"""Loading, extracting, writing, saving and deleting one adapter among 2 and among 64.

Targets: at least 20 times faster than PEFT among 64, and independent of the other 63.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from _arms import ARMS, Wide, arguments, config, finish, in_process, library, llama, ratio, timed
from _report import Report

REPEATS = 7
MEMORY = Path("/dev/shm")
"""A file system without a disk, where Linux has one."""
OPERATIONS = {
    "extract": "get_peft_model_state_dict(model, adapter_name=name)",
    "write": "set_peft_model_state_dict(model, state, name)",
    "save": "model.save_pretrained(folder, selected_adapters=[name])",
    "save in memory": "the same into a folder without a disk",
    "load": "model.load_adapter(folder, new)",
    "delete": "model.delete_adapter(new)",
}


def worker(arm: str, kind: str, *counts: str) -> None:
    """Print the median times of each operation, by number of adapters."""
    targets, lib = config(arm), library(arm)
    peft_model = lib.get_peft_model(llama() if kind == "llama" else Wide(14), targets, "a0")
    found = {}
    shared = MEMORY if MEMORY.is_dir() else None
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryDirectory(dir=shared) as no_disk,
    ):
        for count in map(int, counts):
            while len(peft_model.peft_config) < count:
                peft_model.add_adapter(f"a{len(peft_model.peft_config)}", targets)
            rounds = [measure(lib, peft_model, Path(folder), no_disk) for _ in range(REPEATS + 1)][
                1:
            ]
            found[count] = {
                what: [median(r[what][i] for r in rounds) for i in (0, 1)] for what in OPERATIONS
            }
    print(json.dumps(found))


def measure(
    lib: Any, peft_model: Any, folder: Path, no_disk: str
) -> dict[str, tuple[float, float]]:
    """Time of each operation, once; the model is as before."""
    state: dict[str, Any] = {}
    extract, write = lib.get_peft_model_state_dict, lib.set_peft_model_state_dict
    calls: dict[str, Callable[[], Any]] = {
        "extract": lambda: state.update(extract(peft_model, adapter_name="a1")),
        "write": lambda: write(peft_model, state, "a1"),
        "save": lambda: peft_model.save_pretrained(folder, selected_adapters=["a1"]),
        "save in memory": lambda: peft_model.save_pretrained(no_disk, selected_adapters=["a1"]),
        "load": lambda: peft_model.load_adapter(folder / "a1", "new"),
        "delete": lambda: peft_model.delete_adapter("new"),
    }
    return {name: timed(call) for name, call in calls.items()}


def rows(report: Report, operation: str, found: dict[str, list[dict]], few: int, many: int) -> None:
    """One row a library."""
    wall, cpu = (
        {
            (arm, n): [run[str(n)][operation][i] for run in found[arm]]
            for arm in ARMS
            for n in (few, many)
        }
        for i in (0, 1)
    )
    for arm in ARMS:
        columns = {
            "operation": operation,
            "library": arm,
            f"ms among {few}": wall[arm, few],
            f"ms among {many}": wall[arm, many],
            f"CPU ms among {few}": cpu[arm, few],
            f"CPU ms among {many}": cpu[arm, many],
            f"{many} / {few}, CPU": ratio(cpu[arm, many], cpu[arm, few]),
        }
        if arm == "peft":
            columns["times multigraft's"] = ratio(wall[arm, many], wall["multigraft", many])
            columns["in CPU time"] = ratio(cpu[arm, many], cpu["multigraft", many])
        report.row(**columns)


def main() -> None:
    """One row for each operation and library."""
    options = arguments(__doc__, runs=3).parse_args()
    if options.worker:
        return worker(*options.worker)
    kind, few, many = ("tiny", 2, 4) if options.smallest else ("llama", 2, 64)
    found: dict[str, list[dict]] = {arm: [] for arm in ARMS}
    for _ in range(options.runs):
        for arm in ARMS:
            found[arm].append(in_process("load_save.py", arm, kind, few, many))
    report = Report("load_save", __doc__)
    for operation in OPERATIONS:
        rows(report, operation, found, few, many)
    calls = ", ".join(f"{name} `{call}`" for name, call in OPERATIONS.items())
    report.note(
        f"The calls: {calls}. Each number is the median of {REPEATS} calls in one process after "
        "one that is not counted; the table shows medians and quartiles over processes. "
        "Multigraft flushes what it saves to the disk before it renames it into place; PEFT does "
        "neither. Without a disk flushing costs nothing: that row is the library's own work."
    )
    finish(report, options.output)


if __name__ == "__main__":
    main()
