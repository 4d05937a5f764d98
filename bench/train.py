"""Training as a person does it: tokens per second of whole loops, against PEFT under Trainer.

Targets: one adapter, 1.2 times the speed of PEFT under transformers' Trainer on a GPU at hidden
size 4096, no slower on a CPU; a sweep of 8 adapters, 2.5 times at 1024 tokens a row and 6 times at
256 on a GPU, where PEFT makes eight runs and Multigraft one.

    python bench/train.py          # two CPU cores: 8 layers of hidden size 512, float32
    python bench/train.py --gpu    # one GPU: 8 layers of hidden size 4096, bfloat16
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from _arms import arguments, config, finish, library, llama, ratio
from _report import Report

STEPS, WARM = 8, 3
"""Steps of one run, and how many at its start are not counted."""


Seconds = tuple[float, float]
"""By the clock, and of the processor, which waits for no other process."""


class Shape(NamedTuple):
    """What is trained.

    Args:
        adapters: how many, each with rows of its own.
        rows: of one adapter in one step.
        wide: float32 adapters on a bfloat16 base, PEFT's default.
    """

    adapters: int
    rows: int
    tokens: int
    wide: bool = True
    options: tuple[tuple[str, Any], ...] = ()
    layers: int = 8


CPU = {
    "one adapter, 4 x 128": Shape(1, 4, 128),
    "one adapter, 1 x 64": Shape(1, 1, 64),
    "one adapter, 4 x 128, dropout": Shape(1, 4, 128, options=(("lora_dropout", 0.05),)),
    "8 adapters, 8 x 1 x 64": Shape(8, 1, 64),
    "8 adapters, 8 x 1 x 256": Shape(8, 1, 256),
}
GPU = {
    "one adapter, 4 x 2048": Shape(1, 4, 2048),
    "one adapter, 4 x 2048, bfloat16 adapters": Shape(1, 4, 2048, wide=False),
    "8 adapters, 8 x 1 x 256": Shape(8, 1, 256),
    "8 adapters, 8 x 1 x 256, bfloat16 adapters": Shape(8, 1, 256, wide=False),
    "8 adapters, 8 x 1 x 1024": Shape(8, 1, 1024),
    "8 adapters, 8 x 1 x 1024, bfloat16 adapters": Shape(8, 1, 1024, wide=False),
}
SMALLEST = {"2 adapters, 2 x 1 x 8": Shape(2, 1, 8, layers=1)}


def adapted(arm: str, shape: Shape, on_gpu: bool) -> Any:
    """The base with its adapters, in training."""
    lib = library(arm)
    if on_gpu:
        from gpu import base

        model = base()
    else:
        model = llama(layers=shape.layers)
    own = config(arm, **({"r": 16} if on_gpu else {}), **dict(shape.options))
    peft_model = lib.get_peft_model(model, own, "a0", autocast_adapter_dtype=shape.wide)
    # PEFT trains one after another: a second adapter beside the first would only slow it down.
    for index in range(1, shape.adapters if arm == "multigraft" else 1):
        peft_model.add_adapter(f"a{index}", own, autocast_adapter_dtype=shape.wide)
    return peft_model


def rows_of(shape: Shape, seed: int) -> torch.Tensor:
    """The token ids of every step of one adapter, ``(steps * rows, tokens)``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1000, (STEPS * shape.rows, shape.tokens), generator=generator)


def multigraft(peft_model: Any, shape: Shape) -> list[Seconds]:
    """What each step of all adapters took, the first few left out."""
    from multigraft.train import Encoded, Lane, Recipe
    from multigraft.train.entrant import Entrant
    from multigraft.train.events import Progress
    from multigraft.train.run import Run

    recipe = Recipe(steps=STEPS, batch_size=shape.rows, lr=1e-4)
    entrants = [
        Entrant(
            Lane(
                peft_model,
                f"a{n}",
                [Encoded(row, [True] * shape.tokens) for row in rows_of(shape, n).tolist()],
                recipe,
            )
        )
        for n in range(shape.adapters)
    ]
    times: list[Seconds] = []

    def note(event: Any) -> None:
        if isinstance(event, Progress) and event.adapter == f"a{shape.adapters - 1}":
            times.append(now())

    Run(peft_model, entrants, on_event=note).go()
    return lasted(times)


def peft(peft_model: Any, shape: Shape) -> list[Seconds]:
    """What each step of one adapter took, times the adapters: one run after another."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    times: list[Seconds] = []

    class Note(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(now())

    ids = rows_of(shape, 0).tolist()
    mask = [1] * shape.tokens
    data = [{"input_ids": row, "labels": row, "attention_mask": mask} for row in ids]
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=shape.rows,
            learning_rate=1e-4,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        Trainer(peft_model, settings, train_dataset=data, callbacks=[Note()]).train()
    each = shape.adapters
    return [(each * wall, each * cpu) for wall, cpu in lasted(times)]


ARMS: dict[str, Callable[[Any, Shape], list[Seconds]]] = {"multigraft": multigraft, "peft": peft}


def now() -> Seconds:
    """The clock and the process's own time, once everything before is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def lasted(times: list[Seconds]) -> list[Seconds]:
    """From the end of one step to that of the next, without the first few."""
    pairs = zip(times[WARM:], times[WARM + 1 :], strict=False)
    return [(b[0] - a[0], b[1] - a[1]) for a, b in pairs]


def main() -> None:
    """A row for each shape and library; the libraries take turns, run by run."""
    parser = arguments(__doc__, runs=5)
    parser.add_argument("--gpu", action="store_true", help="the rows of one GPU")
    options = parser.parse_args()
    report = Report("train", __doc__)
    shapes = SMALLEST if options.smallest else GPU if options.gpu else CPU
    for name, shape in shapes.items():
        models = {arm: adapted(arm, shape, options.gpu) for arm in ARMS}
        found: dict[str, list[Seconds]] = {arm: [] for arm in ARMS}
        for run in range(options.runs):
            for arm in ARMS if run % 2 else reversed(ARMS):
                wall, cpu = zip(*ARMS[arm](models[arm], shape), strict=True)
                found[arm].append((statistics.median(wall), statistics.median(cpu)))
        tokens = shape.adapters * shape.rows * shape.tokens
        theirs = [[run[n] for run in found["peft"]] for n in (0, 1)]
        for arm, seconds in found.items():
            own = [[run[n] for run in seconds] for n in (0, 1)]
            report.row(
                shape=name,
                library=arm,
                **{
                    "ms a step of all": [1e3 * s for s in own[0]],
                    "tokens/s": [tokens / s for s in own[0]],
                    "times PEFT's speed": ratio(theirs[0], own[0]),
                    "CPU ms": [1e3 * s for s in own[1]],
                    "in CPU time": ratio(theirs[1], own[1]),
                },
            )
        del models
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    report.note(
        f"Medians over runs of {STEPS} steps, of which the first {WARM} are not counted; a run's "
        "figure is the median of its steps. Data, optimiser, clipping and logging are the loops' "
        "own. PEFT's time for eight adapters is eight times that of one. Rank 8 on the CPU, 16 on "
        "the GPU, every linear layer but the head."
    )
    finish(report, options.output)


if __name__ == "__main__":
    main()
