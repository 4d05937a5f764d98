"""Attaching adapters: 64 on a small Llama, and one more on a model of 3,500 linear layers.

Targets: 64 adapters at least 20 times faster than PEFT in total; the 64th takes at most 1.1 times
the 2nd.
"""

from __future__ import annotations

import gc
import json
from statistics import median

from _arms import (
    ARMS,
    TOUCHED,
    Wide,
    arguments,
    config,
    finish,
    in_process,
    library,
    llama,
    peak,
    ratio,
    resident,
    timed,
    touch_memory,
    warm_up,
)
from _report import Report


def worker(arm: str, kind: str, adapters: str, memory: str) -> None:
    """Print the time that each adapter took, and the memory that all of them needed."""
    model = {"llama": llama, "wide": lambda: Wide(3500), "tiny": lambda: Wide(14)}[kind]()
    warm_up(arm)
    if memory == "touched":
        touch_memory(1024)
    gc.collect()  # what imports left is not ours; from here on the collector runs as it likes
    targets, held, times, before = config(arm), [], [], resident()
    get_peft_model = library(arm).get_peft_model
    times.append(timed(lambda: held.append(get_peft_model(model, targets, "a0"))))
    for index in range(1, int(adapters)):
        times.append(timed(lambda i=index: held[0].add_adapter(f"a{i}", targets)))
    own = sum(p.nbytes for n, p in model.named_parameters() if "lora_" in n) / 2**20
    print(json.dumps({"times": times, "extra": peak() - before - own, "own": own}))


def rows(report: Report, kind: str, adapters: int, memory: str, runs: int) -> None:
    """One row a library; PEFT's also says how many times longer it took."""
    found: dict[str, list[dict]] = {arm: [] for arm in ARMS}
    for _ in range(runs):
        for arm in ARMS:
            env = TOUCHED if memory == "touched" else None
            found[arm].append(in_process("attach.py", arm, kind, adapters, memory, env=env))
    totals = {arm: [sum(wall for wall, _ in run["times"]) for run in found[arm]] for arm in ARMS}
    cpu = {arm: [sum(cpu for _, cpu in run["times"]) for run in found[arm]] for arm in ARMS}
    some = min(8, adapters // 2)
    for arm in ARMS:
        times = [[cpu for _, cpu in run["times"]] for run in found[arm]]
        columns = {
            "library": arm,
            "model": kind,
            "memory": memory,
            "adapters": adapters,
            "total ms": totals[arm],
            "total CPU ms": cpu[arm],
            "2nd, CPU ms": [t[1] for t in times],
            "last, CPU ms": [t[-1] for t in times],
            "last / 2nd": median(t[-1] for t in times) / median(t[1] for t in times),
            # A single call is short; some together are less at the mercy of the machine.
            f"last {some} / {some} from the 2nd": [
                median(t[-some:]) / median(t[1 : 1 + some]) for t in times
            ],
        }
        if memory == "fresh":
            columns["peak MiB beyond the tensors"] = [run["extra"] for run in found[arm]]
            columns["tensors MiB"] = found[arm][0]["own"]
        if arm == "peft":
            columns["total, times multigraft's"] = ratio(totals["peft"], totals["multigraft"])
            columns["in CPU time"] = ratio(cpu["peft"], cpu["multigraft"])
            last = [[run["times"][-1][1] for run in found[a]] for a in ("peft", "multigraft")]
            columns["last, times multigraft's"] = ratio(*last)
        report.row(**columns)


def main() -> None:
    """Both models, both libraries."""
    options = arguments(__doc__, runs=5).parse_args()
    if options.worker:
        return worker(*options.worker)
    report = Report("attach", __doc__)
    if options.smallest:
        rows(report, "tiny", 4, "touched", options.runs)
    else:
        rows(report, "llama", 64, "fresh", options.runs)
        rows(report, "llama", 64, "touched", options.runs)
        rows(report, "wide", 9, "fresh", max(2, options.runs - 2))
    report.note(
        "llama: 8 layers of hidden size 512, 56 layers to adapt. wide: 3,500 linear layers of "
        "32 x 32. Medians and quartiles over processes, each of which has attached two adapters to "
        "a tiny model before. Memory `touched`: the process got its memory from the system before "
        "the clock started, so that page faults, the same for both libraries, are not timed."
    )
    finish(report, options.output)


if __name__ == "__main__":
    main()
