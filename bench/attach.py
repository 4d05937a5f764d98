"""Attaching adapters: 64 on a small Llama, and one more on a model of 3,500 linear layers.

Targets: 64 adapters at least 20 times faster than PEFT in total; the 64th takes at most 1.1 times
the 2nd.
"""

from __future__ import annotations

import argparse
import json

from _arms import ARMS, Wide, config, in_process, library, llama, load_note, peak, ratio
from _arms import resident, seconds, settle
from _report import Report

ADAPTERS = {"llama": 64, "wide": 9}


def worker(arm: str, model_name: str) -> None:
    """Print the seconds that each adapter took, and the memory that all of them needed."""
    model = llama() if model_name == "llama" else Wide(3500)
    targets = config(arm)
    get_peft_model = library(arm).get_peft_model
    get_peft_model(llama(), targets)  # what a first call imports and caches
    settle()
    before, held, times = resident(), [], []
    times.append(seconds(lambda: held.append(get_peft_model(model, targets, "a0"))))
    (peft_model,) = held
    for index in range(1, ADAPTERS[model_name]):
        times.append(seconds(lambda i=index: peft_model.add_adapter(f"a{i}", targets)))
    own = sum(p.nbytes for n, p in model.named_parameters() if "lora_" in n) / 2**20
    print(json.dumps({"times": times, "peak": peak() - before, "own": own}))


def measure(model_name: str, runs: int) -> dict[str, list[dict]]:
    """Runs of both libraries, in turn."""
    found: dict[str, list[dict]] = {arm: [] for arm in ARMS}
    for _ in range(runs):
        for arm in ARMS:
            found[arm].append(in_process("attach.py", arm, model_name))
    return found


def rows(report: Report, what: str, found: dict[str, list[dict]], late: int) -> None:
    """One row a library; PEFT's also says how many times longer it took."""
    totals = {arm: [sum(run["times"]) for run in found[arm]] for arm in ARMS}
    for arm in ARMS:
        times = [run["times"] for run in found[arm]]
        columns = {
            "library": arm,
            "task": what,
            "total s": totals[arm],
            "2nd ms": [t[1] * 1e3 for t in times],
            "last ms": [t[-1] * 1e3 for t in times],
            "last / 2nd": [t[-1] / t[1] for t in times],
            # A single call is short; the mean of some is less at the mercy of the machine.
            f"last {late} / first {late} after the 1st": [
                sum(t[-late:]) / sum(t[1 : 1 + late]) for t in times
            ],
            "peak MiB over the tensors' own": [run["peak"] - run["own"] for run in found[arm]],
            "own MiB": found[arm][0]["own"],
        }
        if arm == "peft":
            columns["times multigraft's total"] = ratio(totals["peft"], totals["multigraft"])
        report.row(**columns)


def main() -> None:
    """Both models, both libraries."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="processes for each row")
    parser.add_argument("--worker", nargs=2)
    options = parser.parse_args()
    if options.worker:
        return worker(*options.worker)
    report = Report("attach", __doc__)
    rows(report, "64 adapters, 56 layers", measure("llama", options.runs), 8)
    rows(report, "9 adapters, 3,500 layers", measure("wide", max(2, options.runs - 2)), 3)
    report.note(
        "Medians and quartiles over processes. Before the clock starts, each process has attached "
        "one adapter to another model, and the garbage collector has frozen what imports left "
        "(then it stays on)."
    )
    report.note(load_note()).write()


if __name__ == "__main__":
    main()
