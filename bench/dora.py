"""One training step with DoRA: forward, backward and a step of AdamW, against LoRA's and PEFT's.

Target: at most 1.06 times our LoRA's step, and PEFT's DoRA at least 1.5 times as long as ours.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _arms import arguments, config, finish, library, llama, ratio, timed
from _report import Report

ARMS = {
    "multigraft, LoRA": ("multigraft", {}),
    "multigraft, DoRA": ("multigraft", {"use_dora": True}),
    "peft, DoRA": ("peft", {"use_dora": True}),
}
LORA, OURS, PEFT = ARMS
SHAPES = {
    "1 x 64": ((1, 64), 1, {}),
    "4 x 128": ((4, 128), 1, {}),
    "4 x 128, 4 batches a step": ((4, 128), 4, {}),
    "8 x 256": ((8, 256), 1, {}),
    "4 x 128, r=64": ((4, 128), 1, {"r": 64}),
    "4 x 128, dropout": ((4, 128), 1, {"lora_dropout": 0.1}),
}
"""Rows and tokens of a batch, batches between two steps of the optimiser, and options."""
SMALLEST = {"1 x 8": ((1, 8), 2, {})}


def step(peft_model: Any, optimiser: Any, inputs: dict[str, torch.Tensor], batches: int) -> None:
    """Forwards, backwards, and new values."""
    for _ in range(batches):
        peft_model(**inputs).loss.backward()
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def arm(
    name: str, batch: tuple[int, int], batches: int, options: dict[str, Any]
) -> Callable[[], None]:
    """One arm's step on a model of its own."""
    package, more = ARMS[name]
    chosen = config(package, **options, **more)
    peft_model = library(package).get_peft_model(llama(), chosen).train()
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    torch.manual_seed(1)
    tokens = torch.randint(1000, batch)
    return partial(step, peft_model, optimiser, {"input_ids": tokens, "labels": tokens}, batches)


def saved(call: Callable[[], None]) -> float:
    """MiB that the graphs of one step keep for their backward passes, parameters not counted."""
    found: dict[int, torch.UntypedStorage] = {}  # held, so that no address comes twice

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        call()
    return sum(storage.nbytes() for storage in found.values()) / 2**20


def main() -> None:
    """Three rows for each shape; the arms take turns, step by step."""
    options = arguments(__doc__, runs=15).parse_args()
    report = Report("dora", __doc__)
    for shape, case in (SMALLEST if options.smallest else SHAPES).items():
        steps = {name: arm(name, *case) for name in ARMS}
        kept = {name: saved(call) for name, call in steps.items()}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in ARMS}
        for run in range(-1, options.runs):
            for name in ARMS if run % 2 else reversed(ARMS):
                measured = timed(steps[name])
                if run >= 0:  # the first of each warms up
                    times[name].append(measured)
        wall, cpu = ({name: [t[i] for t in times[name]] for name in ARMS} for i in (0, 1))
        for name in ARMS:
            report.row(
                **{
                    "shape": shape,
                    "arm": name,
                    "ms": wall[name],
                    "CPU ms": cpu[name],
                    "least CPU ms": min(cpu[name]),
                    "times LoRA's": ratio(wall[name], wall[LORA]),
                    "in CPU time": ratio(cpu[name], cpu[LORA]),
                    "times our DoRA's, in CPU time": ratio(cpu[name], cpu[OURS]),
                    "MiB kept for backward": kept[name],
                }
            )
    report.note(
        "A Llama of 8 layers of hidden size 512, 56 of whose layers are adapted; batch x tokens. "
        "Rank 8 unless named. Medians and quartiles over steps in one process; the ratios are "
        "those of steps in succession. What the graph keeps is without parameters and weights."
    )
    finish(report, options.output)


if __name__ == "__main__":
    main()
