"""``multigraft train``: one adapter on your own base model, from your own file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from multigraft import LoraConfig
from multigraft.cli.interrupted import Interrupted
from multigraft.cli.screen import duration, heading, live, screen
from multigraft.cli.spec import names_or_expression
from multigraft.train import SCHEDULES, AdapterJob, Job, Outcome, Progress, Recipe, formats


def train(
    model: Annotated[str, typer.Option(help="Base model: a directory, or an id on the hub.")],
    data: Annotated[
        str,
        typer.Option(
            help="JSONL, JSON, CSV, Parquet or text file, a directory, or an id on the hub."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the adapter.")],
    adapter_name: Annotated[
        str, typer.Option(help="Its name; one other than `default` gets a subfolder.")
    ] = "default",
    rank: Annotated[int, typer.Option("--rank", "-r", help="Rank of the low-rank update.")] = 16,
    alpha: Annotated[
        float | None,
        typer.Option(help="The update is scaled by alpha / rank. [default: twice the rank]"),
    ] = None,
    dropout: Annotated[float, typer.Option(help="Dropout of the adapter's input.")] = 0.0,
    target_modules: Annotated[
        str, typer.Option(help="Names, separated by commas; or one regular expression.")
    ] = "all-linear",
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 3.0,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps, in place of epochs.")] = None,
    batch_size: Annotated[int, typer.Option(help="Examples in a step.")] = 8,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-4,
    schedule: Annotated[str, typer.Option(help=f"One of {', '.join(SCHEDULES)}.")] = "cosine",
    warmup: Annotated[
        float, typer.Option(help="Share of the steps, or from 1 on their number.")
    ] = 0.05,
    weight_decay: Annotated[float, typer.Option(help="AdamW's.")] = 0.0,
    max_length: Annotated[int, typer.Option(min=2, help="Longer examples are cut.")] = 1024,
    format: Annotated[str, typer.Option(help=f"Of the data: {', '.join(formats())}.")] = "auto",
    packing: Annotated[
        bool, typer.Option("--packing", help="Several examples in a row; none sees another.")
    ] = False,
    group_by_length: Annotated[
        bool, typer.Option("--group-by-length", help="Examples of like length share a batch.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Initial values, order and dropout.")] = 0,
    eval_data: Annotated[
        str | None, typer.Option(help="Data to measure on, before and after.")
    ] = None,
    eval_split: Annotated[
        float | None, typer.Option(help="Share of the data to hold out for that, e.g. 0.1.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the base: auto, float32, bfloat16 or float16.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, …")] = "auto",
    on_bad_line: Annotated[
        str, typer.Option(help="Where a line cannot be used: fail, or skip it.")
    ] = "fail",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an adapter that is there already.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Fine-tune a LoRA adapter on your data; the base stays as it is.

    Rows look like `{"prompt": "…", "completion": "…"}`, used as they stand, or like
    `{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}`, which
    go through the tokeniser's chat template; alpaca, sharegpt and plain text are known as well.
    Loss is on the completion and the assistant's turns: `multigraft preview` shows it.

    Example: `multigraft train --model Qwen/Qwen3-0.6B --data pairs.jsonl --output my-adapter`
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=names_or_expression([target_modules]),
        task_type="CAUSAL_LM",
    )
    recipe = Recipe(
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        schedule=schedule,
        warmup=warmup,
        weight_decay=weight_decay,
        group_by_length=group_by_length,
        seed=seed,
    )
    adapter = AdapterJob(
        data=data,
        config=config,
        recipe=recipe,
        name=adapter_name,
        eval_data=eval_data,
        eval_split=eval_split,
        format=format,
        packing=packing,
        max_length=max_length,
        on_bad_line=on_bad_line,
    )
    job = Job(model, str(output), (adapter,), dtype=dtype, device=device, overwrite=overwrite)
    console, start = screen(quiet=quiet), time.monotonic()
    (outcome,) = _run(console, job)
    _summary(console, job, outcome, time.monotonic() - start)


def _run(console: Console, job: Job) -> list[Outcome]:
    with console.status("Reading the data and loading the base model"):
        ready = job.prepare()
    trainable, total = ready.model.get_nb_trainable_parameters()
    adapter, lane = job.adapters[0], ready.entrants[0].lane
    heading(console, f"Training `{adapter.name}` on {job.model}")
    packs = lane.packs
    rows = "" if packs is None else f" packed into {len(packs):,} rows"
    console.print(
        f"{len(lane.examples):,} examples{rows}, {lane.steps:,} steps of "
        f"{adapter.recipe.batch_size}; {trainable:,} trainable of {total:,} parameters"
    )
    for line in ready.bad:
        console.print(f"[yellow]left out[/] {escape(str(line))}")
    if ready.cut:
        console.print(
            f"[yellow]{ready.cut} examples are longer than {adapter.max_length} tokens and were cut[/]"
        )
    console.print()
    try:
        with live(console, [adapter.name]) as on_step:
            return ready.run(lambda now: on_step(now) if isinstance(now, Progress) else None)
    except KeyboardInterrupt:
        raise Interrupted(ready.rescue()) from None


def _summary(console: Console, job: Job, outcome: Outcome, seconds: float) -> None:
    heading(console, "Summary")
    last = outcome.losses[-10:]
    console.print(
        f"loss         {outcome.losses[0]:.4f} at the first step, {sum(last) / len(last):.4f} as "
        f"the mean of the last {len(last)}"
    )
    if outcome.eval_loss is not None and outcome.exact_match is not None:
        before, after = outcome.eval_loss
        console.print(f"held-out     loss {before:.4f} before, {after:.4f} after")
        before, after = outcome.exact_match
        console.print(f"exact match  {before:.1%} before, {after:.1%} after")
    console.print(f"time         {duration(seconds)}")
    console.print(f"saved in     {escape(str(outcome.folder))}")
    heading(console, "Load it")
    console.print(
        "from transformers import AutoModelForCausalLM\n"
        "from multigraft import PeftModel  # or: from peft import PeftModel\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({job.model!r})\n"
        f"model = PeftModel.from_pretrained(base, {str(outcome.folder)!r})",
        markup=False,
        soft_wrap=True,
    )
