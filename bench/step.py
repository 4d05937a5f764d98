"""One forward and backward with one active adapter, in training mode.

Target: no slower than PEFT.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _arms import ARMS, Stack, arguments, config, finish, library, llama, ratio, timed
from _report import Report

WIDTH = 1024
LEAST = 100.0
"""Milliseconds of one measurement; short steps are repeated until they fill it."""
SHAPES = {
    "llama 1 x 16": ("llama", torch.float32, (1, 16), {}),
    "llama 4 x 128": ("llama", torch.float32, (4, 128), {}),
    "llama 8 x 256": ("llama", torch.float32, (8, 256), {}),
    "llama 4 x 128, dropout": ("llama", torch.float32, (4, 128), {"lora_dropout": 0.1}),
    "llama 4 x 128, r=64": ("llama", torch.float32, (4, 128), {"r": 64}),
    "llama 4 x 128, bfloat16 base": ("llama", torch.bfloat16, (4, 128), {}),
    "4 layers of 1024, 1 x 1": ("stack", torch.float32, (1, 1), {}),
    "4 layers of 1024, 8 x 128": ("stack", torch.float32, (8, 128), {}),
}
SMALLEST = {"4 layers of 1024, 1 x 1": SHAPES["4 layers of 1024, 1 x 1"]}


def step(peft_model: Any, inputs: dict[str, torch.Tensor]) -> None:
    """A forward, a backward, and gradients gone again."""
    out = peft_model(**inputs)
    loss = out.loss if hasattr(out, "loss") else out.float().square().mean()
    loss.backward()
    peft_model.zero_grad(set_to_none=True)


def arms(
    kind: str, dtype: torch.dtype, batch: tuple[int, int], options: dict[str, Any]
) -> dict[str, Callable[[], None]]:
    """A step of each library on equal models."""
    steps = {}
    for arm in ARMS:
        base = llama(dtype=dtype) if kind == "llama" else Stack(4, WIDTH, dtype)
        named = {"target_modules": base.names()} if isinstance(base, Stack) else {}
        peft_model = library(arm).get_peft_model(base, config(arm, **named, **options)).train()
        torch.manual_seed(1)
        if kind == "llama":
            tokens = torch.randint(1000, batch)
            inputs = {"input_ids": tokens, "labels": tokens}
        else:
            inputs = {"x": torch.randn(*batch, WIDTH)}
        steps[arm] = partial(step, peft_model, inputs)
    return steps


def many(call: Callable[[], None], count: int) -> tuple[float, float]:
    """Milliseconds of one of ``count`` calls in succession: by the clock, and of the processor."""
    wall, cpu = timed(lambda: [call() for _ in range(count)])
    return wall / count, cpu / count


def main() -> None:
    """One row for each shape and library; the two take turns, step by step."""
    options = arguments(__doc__, runs=15).parse_args()
    report = Report("step", __doc__)
    for shape, case in (SMALLEST if options.smallest else SHAPES).items():
        steps = arms(*case)
        times = {arm: [many(steps[arm], 1)] for arm in ARMS for _ in range(2)}  # and warm up
        count = max(1, round(LEAST / times[ARMS[0]][0][0]))
        times = {arm: [] for arm in ARMS}
        for run in range(options.runs):
            for arm in ARMS if run % 2 else reversed(ARMS):
                times[arm].append(many(steps[arm], count))
        wall, cpu = ({arm: [t[i] for t in times[arm]] for arm in ARMS} for i in (0, 1))
        for arm in ARMS:
            columns = {
                "shape": shape,
                "library": arm,
                "ms": wall[arm],
                "CPU ms": cpu[arm],
                "least CPU ms": min(cpu[arm]),
            }
            if arm == "peft":
                columns["times multigraft's"] = ratio(wall["peft"], wall["multigraft"])
                columns["in CPU time"] = ratio(cpu["peft"], cpu["multigraft"])
            report.row(**columns)
    report.note(
        "llama: 8 layers of hidden size 512, 56 of whose layers are adapted; batch x tokens. "
        "Rank 8 unless named. Medians and quartiles over measurements in one process, each of one "
        f"step, or of as many as take {LEAST:.0f} ms; the ratios are those of two in succession."
    )
    finish(report, options.output)


if __name__ == "__main__":
    main()
