"""Merging one adapter into bfloat16 weights on the CPU, and taking it out again.

Target: at least 5 times faster than PEFT, accumulated in float32 and rounded once. Multigraft
keeps the original values, so that unmerging restores the bits; PEFT subtracts.
"""

from __future__ import annotations

from typing import Any

import torch
from _arms import ARMS, Stack, arguments, config, finish, library, llama, ratio, timed
from _report import Report
from torch import nn

CASES = {
    "llama, hidden 512": lambda: llama(dtype=torch.bfloat16),
    "4 layers of 2048 x 2048": lambda: Stack(4, 2048, torch.bfloat16),
    "4 layers of 4096 x 4096": lambda: Stack(4, 4096, torch.bfloat16),
}
SMALLEST = {"2 layers of 64 x 64": lambda: Stack(2, 64, torch.bfloat16)}


def arm_model(arm: str, base: nn.Module, full: bool) -> Any:
    """An adapted model whose adapter does something; float32 factors, or the base's own dtype."""
    named = {} if type(base) is not Stack else {"target_modules": base.names()}
    targets = config(arm, r=16, init_lora_weights=False, **named)
    torch.manual_seed(1)
    return library(arm).get_peft_model(base, targets, autocast_adapter_dtype=full)


def weights(peft_model: Any) -> dict[str, torch.Tensor]:
    """The base weights of the adapted layers, by name."""
    named = peft_model.base_model.model.named_parameters()
    return {name: p.detach() for name, p in named if name.endswith("base_layer.weight")}


def error(peft_model: Any, before: dict[str, torch.Tensor]) -> float:
    """RMS error of the merged weights, in units of the rounding that storing them needs.

    1 is a correct rounding of the exact sum.
    """
    params = dict(peft_model.base_model.model.named_parameters())
    mine = least = 0.0
    for name, merged in weights(peft_model).items():
        a, b = (
            params[name.replace("base_layer", f"lora_{x}.default")].detach().double() for x in "AB"
        )
        exact = before[name].double() + b @ a * (8 / 16)
        mine += float((merged.double() - exact).square().sum())
        least += float((exact.to(merged.dtype).double() - exact).square().sum())
    return (mine / least) ** 0.5


def changed(peft_model: Any, before: dict[str, torch.Tensor]) -> float:
    """Share of the base's values, in per cent, that a merge and an unmerge have changed."""
    now = weights(peft_model)
    wrong = sum(int((now[n] != w).sum()) for n, w in before.items())
    return 100 * wrong / sum(w.numel() for w in before.values())


def rows(report: Report, what: str, make: Any, full: bool, runs: int) -> None:
    """One row a library; they take turns."""
    models = {arm: arm_model(arm, make(), full) for arm in ARMS}
    merge: dict[str, list[float]] = {arm: [] for arm in ARMS}
    unmerge: dict[str, list[float]] = {arm: [] for arm in ARMS}
    facts = {}
    for run in range(runs + 1):
        for arm, peft_model in models.items():
            before = {n: w.clone() for n, w in weights(peft_model).items()} if not run else {}
            into = timed(peft_model.base_model.merge_adapter)[1]
            off = error(peft_model, before) if not run else 0.0
            out = timed(peft_model.base_model.unmerge_adapter)[1]
            if not run:
                facts[arm] = (off, changed(peft_model, before))
                continue
            merge[arm].append(into)
            unmerge[arm].append(out)
    for arm in ARMS:
        columns = {
            "model": what,
            "factors": "float32" if full else "bfloat16",
            "library": arm,
            "merge, CPU ms": merge[arm],
            "unmerge, CPU ms": unmerge[arm],
            "error / rounding": facts[arm][0],
            "% changed after unmerge": facts[arm][1],
        }
        if arm == "peft":
            columns["merge, times multigraft's"] = ratio(merge["peft"], merge["multigraft"])
            columns["unmerge, times multigraft's"] = ratio(unmerge["peft"], unmerge["multigraft"])
        report.row(**columns)


def main() -> None:
    """Every model, with float32 factors (the default) and with bfloat16 ones."""
    options = arguments(__doc__, runs=11).parse_args()
    report = Report("merge", __doc__)
    for what, make in (SMALLEST if options.smallest else CASES).items():
        for full in (True, False):
            rows(report, what, make, full, options.runs)
    report.note(
        "Rank 16. `error / rounding`: root mean square difference from the exact sum, over that of "
        "the exact sum rounded to bfloat16; 1 is the least possible. Medians and quartiles over "
        "runs in one process."
    )
    finish(report, options.output)


if __name__ == "__main__":
    main()
