"""Combining two adapters of rank 16 into one of rank 16 on the CPU, by the exact sum or its SVD.

Target: `svd` at least 20 times faster than PEFT at hidden size 4096. Multigraft decomposes the
factors; PEFT the dense product. `ties_svd` needs the dense product in both.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from _arms import ARMS, Stack, arguments, config, finish, library, ratio, timed
from _report import Report

RANK, WEIGHTS = 16, [0.7, -0.4]
CASES = [("svd", 1024), ("ties_svd", 1024), ("cat", 4096), ("svd", 4096)]
SMALLEST = [("svd", 64), ("ties_svd", 64), ("cat", 64)]


def arm_model(arm: str, size: int) -> Any:
    """One linear layer with two random adapters."""
    base = Stack(1, size, torch.float32)
    options = {"r": RANK, "init_lora_weights": False, "target_modules": base.names()}
    torch.manual_seed(1)
    model = library(arm).get_peft_model(base, config(arm, **options), adapter_name="a")
    model.add_adapter("b", config(arm, **options))
    return model


def update(model: Any, adapter: str) -> torch.Tensor:
    """The adapter's ΔW, ``(size, size)``."""
    layer = model.base_model.model.layers[0]
    A, B = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
    return layer.scaling[adapter] * (B @ A)


def error(model: Any) -> float:
    """Distance of the combination from the weighted sum, relative to the sum."""
    exact = sum(w * update(model, name) for w, name in zip(WEIGHTS, "ab", strict=True))
    return float((update(model, "sum") - exact).norm() / exact.norm())


def rows(report: Report, rule: str, size: int, runs: int) -> None:
    """One row a library; they take turns."""
    models = {arm: arm_model(arm, size) for arm in ARMS}
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    errors = {}
    density = {"density": 0.5} if rule.startswith("ties") else {}
    for _ in range(runs):
        for arm, model in models.items():
            add = model.base_model.add_weighted_adapter
            call = partial(add, ["a", "b"], WEIGHTS, "sum", rule, **density)
            times[arm].append(timed(call)[1])
            errors[arm] = error(model)
            model.delete_adapter("sum")
    for arm in ARMS:
        columns = {
            "rule": rule,
            "hidden": size,
            "library": arm,
            "CPU ms": times[arm],
            "distance from the sum": errors[arm],
        }
        if arm == "peft":
            columns["times multigraft's"] = ratio(times["peft"], times["multigraft"])
        report.row(**columns)


def main() -> None:
    """Every rule and size."""
    options = arguments(__doc__, runs=3).parse_args()
    report = Report("combine", __doc__)
    for rule, size in SMALLEST if options.smallest else CASES:
        for arm in ARMS:  # what is imported and cached at a first call
            arm_model(arm, 8).base_model.add_weighted_adapter(["a", "b"], WEIGHTS, "sum", "svd")
        rows(report, rule, size, options.runs)
    report.note(
        "One linear layer. Equal distances from the sum: both find the best pair of that rank."
    )
    finish(report, options.output)


if __name__ == "__main__":
    main()
