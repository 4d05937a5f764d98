"""Training steps and decoding on the CPU against the frozen base itself.

The floor is forward plus the gradient of the input for training, forward for inference. Targets:
training 2 x 256 at most 1.08 of it, one active adapter 1.10, 32 rows with 32 adapters 1.6.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from _arms import arguments, config, finish, library, llama, ratio, timed
from _report import Report

ARMS = ("floor", "multigraft", "peft")
Runs = dict[str, Callable[[], Any]]


def model(arm: str, adapters: int = 1) -> Any:
    """The frozen base, or the base with so many adapters that change something."""
    if arm == "floor":
        return llama().requires_grad_(False)
    options = config(arm, init_lora_weights=False)
    adapted = library(arm).get_peft_model(llama(), options, "a0")
    for index in range(1, adapters):
        adapted.add_adapter(f"a{index}", options)
    return adapted


def training(rows: int, tokens: int) -> Runs:
    """Forward, loss and backward, down to the gradient of the input."""
    ids = torch.randint(1000, (rows, tokens))

    def step(arm: str) -> Callable[[], None]:
        own = model(arm).train()
        inner = own if arm == "floor" else own.get_base_model()
        embeds = inner.get_input_embeddings()(ids).detach().requires_grad_()

        def run() -> None:
            own(inputs_embeds=embeds, labels=ids, use_cache=False).loss.backward()
            embeds.grad = None
            own.zero_grad(set_to_none=True)

        return run

    return {arm: step(arm) for arm in ARMS}


def decoding(adapters: int, stack: ExitStack) -> Runs:
    """One token of 32 rows, without a cache: every row its own adapter, or all the same one."""
    ids = torch.randint(1000, (32, 1))
    names = [f"a{row % adapters}" for row in range(32)]

    def forward(arm: str) -> Callable[[], None]:
        own = model(arm, adapters).eval()
        more = {"adapter_names": names} if arm == "peft" and adapters > 1 else {}
        if arm == "multigraft" and adapters > 1:
            stack.enter_context(own.mixed_batch(names))
        return torch.no_grad()(lambda: own(input_ids=ids, use_cache=False, **more))

    return {arm: forward(arm) for arm in ARMS}


def main() -> None:
    """One row for each workload and arm; the arms take turns."""
    options = arguments(__doc__, runs=15).parse_args()
    report = Report("floor", __doc__)
    with ExitStack() as stack:
        workloads = {
            "training 2 x 256": training(*((1, 8) if options.smallest else (2, 256))),
            "decoding 32 rows, 1 adapter": decoding(1, stack),
            "decoding 32 rows, 32 adapters": decoding(2 if options.smallest else 32, stack),
        }
        for workload, runs in workloads.items():
            times: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
            for turn in range(options.runs + 2):
                for arm in ARMS if turn % 2 else reversed(ARMS):
                    found = timed(runs[arm])
                    if turn >= 2:
                        times[arm].append(found)
            wall, cpu = ({arm: [t[i] for t in times[arm]] for arm in ARMS} for i in (0, 1))
            for arm in ARMS:
                report.row(
                    workload=workload,
                    arm=arm,
                    ms=wall[arm],
                    **{
                        "of the floor": ratio(wall[arm], wall["floor"]),
                        "in CPU time": ratio(cpu[arm], cpu["floor"]),
                    },
                )
    report.note(
        "8-layer Llama of hidden size 512, rank 8 on all 56 linear layers, float32. The many "
        "adapters act in a `mixed_batch` block, as in `generate`."
    )
    finish(report, options.output)


if __name__ == "__main__":
    main()
