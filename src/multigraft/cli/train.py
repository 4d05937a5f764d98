"""``multigraft train``: adapters on your own base model, from your own files, in one run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from multigraft.cli.flags import given, with_flags
from multigraft.cli.interrupted import Interrupted
from multigraft.cli.screen import duration, heading, live, screen
from multigraft.train import REPORT, Job, Outcome, Prepared, launched
from multigraft.train.spec import RunSpec, job_of, read_run


def _train(
    file: Annotated[
        Path | None, typer.Argument(help="A run's YAML file; flags win over what it says.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    flags: Any = None,
) -> None:
    """Fine-tune adapters on your data, one or several in one run; the base stays as it is.

    Rows look like `{"prompt": "…", "completion": "…"}`, used as they stand, or like
    `{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}`, which
    go through the tokeniser's chat template; alpaca, sharegpt and plain text are known as well.
    Loss is on the completion and the assistant's turns: `multigraft preview` shows it.

    Example: `multigraft train --model Qwen/Qwen3-0.6B --data pairs.jsonl --output my-adapter`

    Example: `multigraft train run.yaml --lr 1e-4 --sweep rank=[8,16]`
    """
    asked = read_run(file, given(RunSpec, flags))
    job = job_of(asked)
    with launched(asked.timeout, job.device) as ranks:
        console, start = (
            screen(quiet=quiet or not (ranks is None or ranks.is_main)),
            time.monotonic(),
        )
        outcomes = _run(console, job, ranks)
        _summary(console, job, outcomes, time.monotonic() - start)


train = with_flags(RunSpec, _train)
train.__name__ = "train"


def _run(console: Console, job: Job, ranks: Any) -> list[Outcome]:
    with console.status("Reading the data and loading the base model"):
        ready = job.prepare(ranks)
    names = [entrant.name for entrant in ready.entrants]
    several = f"{len(names)} adapters" if len(names) > 1 else f"`{names[0]}`"
    shared = f", on {ranks.size} processes ({job.strategy})" if ranks is not None else ""
    heading(console, f"Training {several} on {job.model}{shared}")
    _introduce(console, ready)
    try:
        with live(console, names) as on_event:
            return ready.run(on_event)
    except KeyboardInterrupt:
        raise Interrupted(ready.rescue()) from None


def _introduce(console: Console, ready: Prepared) -> None:
    for entrant in ready.entrants:
        lane = entrant.lane
        rows = "" if lane.packs is None else f" packed into {len(lane.packs):,} rows"
        batch = f"{lane.recipe.batch_size}" + (
            f" x {lane.recipe.accumulate}" if lane.recipe.accumulate > 1 else ""
        )
        own = sum(parameter.numel() for parameter in lane.parameters)
        done = f", of which {lane.step:,} are made" if lane.step else ""
        console.print(
            f"{escape(lane.adapter)}: {len(lane.examples):,} examples{rows}, {lane.steps:,} steps "
            f"of {batch}{done}; {own:,} parameters",
            soft_wrap=True,
        )
    total = sum(p.numel() for p in ready.model.parameters())
    console.print(f"the base with all adapters has {total:,} parameters")
    for line in ready.bad:
        console.print(f"[yellow]left out[/] {escape(str(line))}")
    if ready.cut:
        console.print(f"[yellow]{ready.cut} examples are longer than `max_length` and were cut[/]")
    console.print()


def _summary(console: Console, job: Job, outcomes: list[Outcome], seconds: float) -> None:
    heading(console, "Summary")
    table = Table("adapter", "steps", "loss", "held-out loss", "exact match", box=None)
    for each in outcomes:
        last = each.losses[-10:]
        loss = f"{each.losses[0]:.4f} → {sum(last) / len(last):.4f}" if last else "–"
        pair = each.eval_loss
        held_out = "–" if pair is None else f"{pair[0]:.4f} → {pair[1]:.4f}"
        match = each.exact_match
        right = "–" if match is None else f"{match[0]:.1%} → {match[1]:.1%}"
        steps = f"{len(each.losses):,}" + (" (stopped early)" if each.why == "stopped" else "")
        if each.kept_step != len(each.losses):
            steps += f", kept {each.kept_step:,}"
        table.add_row(each.name, steps, loss, held_out, right)
    console.print(table)
    console.print(
        "\nLoss: of the first step, and the mean of the last ten. Held-out: before training, and "
        "of what was saved."
    )
    console.print(f"time         {duration(seconds)}")
    if (Path(job.output) / REPORT).exists():
        console.print(f"report       {escape(str(Path(job.output) / REPORT))}", soft_wrap=True)
    for each in outcomes:
        console.print(f"saved in     {escape(str(each.folder))}", soft_wrap=True)
    heading(console, "Load it")
    first = outcomes[0]
    named = "" if first.name == "default" else f", adapter_name={first.name!r}"
    more = "".join(
        f"\nmodel.load_adapter({str(each.folder)!r}, {each.name!r})" for each in outcomes[1:3]
    )
    console.print(
        "from transformers import AutoModelForCausalLM\n"
        "from multigraft import PeftModel  # or: from peft import PeftModel\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({job.model!r})\n"
        f"model = PeftModel.from_pretrained(base, {str(first.folder)!r}{named}){more}",
        markup=False,
        soft_wrap=True,
    )
