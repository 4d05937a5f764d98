"""``multigraft quickstart``: three adapters on one small base, from nothing to reloaded files."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from multigraft.cli.screen import duration, heading, live, screen, tree
from multigraft.demo import RECIPE
from multigraft.demo.quickstart import BASE, Quickstart


def quickstart(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory for the three adapters.")
    ] = Path("quickstart-output"),
    seed: Annotated[int, typer.Option(min=0, help="Decides initial values and order.")] = 0,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads [default: torch's choice]; 1 on a busy machine."),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(help="Keep the base's linear layers in nf4, fp4 or int8 (bitsandbytes)."),
    ] = None,
    base: Annotated[Path | None, typer.Option(hidden=True)] = None,
    steps: Annotated[int | None, typer.Option(hidden=True, min=1)] = None,
    heldout: Annotated[int | None, typer.Option(hidden=True, min=1)] = None,
) -> None:
    """Train three adapters side by side on the small model in the package, and check the result.

    Nothing is fetched. It takes about a minute on two CPU cores, and exits with 1 if one of the
    promises that it ends with is broken.

    Example: `multigraft quickstart --output my-adapters`
    """
    if threads is not None:
        torch.set_num_threads(threads)
    recipe = dataclasses.replace(
        RECIPE, steps=steps or RECIPE.steps, heldout=heldout or RECIPE.heldout
    )
    job = Quickstart(output, seed, recipe, base, quantize=quantize)
    console = screen()
    start = time.monotonic()
    _train(console, job)
    _structure(console, job)
    _evaluate(console, job)
    _mixed(console, job)
    _reload(console, job)
    raise typer.Exit(0 if _summary(console, job, time.monotonic() - start) else 1)


def _train(console: Console, job: Quickstart) -> None:
    heading(console, "Training three adapters in one run, each on its own task")
    with console.status("Loading the base model"):
        job.ready  # noqa: B018 (reads the data and loads the model)
    for task in job.tasks:
        console.print(f"  [cyan]{task.name:<12}[/] {escape(task.description)}")
    console.print()
    with live(console, [task.name for task in job.tasks]) as on_event:
        job.train(on_event)


def _structure(console: Console, job: Quickstart) -> None:
    heading(console, "Structure")
    structure = job.structure()
    console.print(tree(structure))
    if structure.is_flat:
        console.print(
            f"\nChecked in the module tree: none of the {len(structure.sites)} adapted layers lies "
            "inside another one."
        )
    else:
        console.print(f"\n[red]Adapted layers inside others:[/] {', '.join(structure.nested)}")


def _evaluate(console: Console, job: Quickstart) -> None:
    heading(console, "Exact match on held-out examples: every adapter on every task")
    with console.status("Generating answers"):
        columns = [job.evaluate(task) for task in job.tasks]
    table = Table("adapter", *(f"task {task.name}" for task in job.tasks), box=None)
    for name in columns[0]:
        cells = []
        for task, column in zip(job.tasks, columns, strict=True):
            text = f"{column[name]:.0%}".rjust(4)
            cells.append(f"[bold green]{text}[/]" if name == task.name else f"[dim]{text}[/]")
        table.add_row("base alone" if name == BASE else f"[cyan]{name}[/]", *cells)
    console.print(table)
    console.print(f"\n{job.recipe.heldout} examples a task, none of them seen in training.")


def _mixed(console: Console, job: Quickstart) -> None:
    heading(console, "One mixed batch: each row names its own adapter")
    with console.status("Generating answers"):
        rows = job.mixed_batch()
    table = Table("adapter_names", "input", "output", box=None)
    for row in rows:
        mark = "[green]✓[/]" if row.is_right else "[dim]·[/]"
        given = escape(" ".join(row.given.split())[:100])
        style = "dim" if row.adapter == BASE else "cyan"
        table.add_row(f"[{style}]{row.adapter}[/]", escape(row.text), f"{mark} {given}")
    console.print(table)


def _reload(console: Console, job: Quickstart) -> None:
    heading(console, "Saved, and loaded onto a fresh base")
    with console.status("Saving and loading"):
        found = job.reload()
    for folder in found.folders:
        console.print(f"  {escape(str(folder))}")
    console.print(
        f"\nLogits of that mixed batch, trained model against reloaded one: largest difference "
        f"{found.max_difference:g}."
    )


def _summary(console: Console, job: Quickstart, seconds: float) -> bool:
    promises = job.promises()
    heading(console, "Summary")
    for promise in promises:
        mark = "[green]✓[/]" if promise.is_kept else "[red]✗[/]"
        console.print(f"{mark} {escape(promise.claim)} [dim]({escape(promise.figures)})[/]")
    kept = all(promise.is_kept for promise in promises)
    verdict = "Every promise holds" if kept else "[red]A promise is broken[/]"
    console.print(f"\n{verdict}, after {duration(seconds)} on {torch.get_num_threads()} threads.")
    if kept:
        console.print(
            "Your own data: [bold]multigraft train --model PATH_OR_ID --data FILE.jsonl "
            "--output DIR[/]"
        )
    return kept
