"""``multigraft eval``: how good adapters are on held-out data, beside the base."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from multigraft.cli import speaking
from multigraft.cli.screen import screen
from multigraft.generation import load_ensemble, shown
from multigraft.train import formats
from multigraft.train.compare import Score, compare
from multigraft.train.dataset import Loaded, load_data, records_of
from multigraft.train.tasks import TASKS, Task, task_of


def evaluate(
    data: Annotated[str, typer.Argument(help="As for `multigraft train --data`.")],
    adapter: speaking.Adapters = None,
    base: speaking.Base = None,
    with_base: Annotated[
        bool, typer.Option("--compare/--no-compare", help="Score the base alone as well.")
    ] = True,
    task: Annotated[
        str,
        typer.Option(help=f"{', '.join(sorted(TASKS))}; or JSON with `name` and its options."),
    ] = "causal-lm",
    format: Annotated[str, typer.Option(help=f"Of the data: {', '.join(formats())}.")] = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many examples.")] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Longer examples are cut.")] = 1024,
    answers: Annotated[
        bool, typer.Option("--answers/--no-answers", help="Let them write, for exact match.")
    ] = True,
    max_new_tokens: speaking.MaxNewTokens = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at once, of all together.")] = 16,
    on_bad_line: Annotated[
        str, typer.Option(help="Where a line cannot be used: fail, or skip it.")
    ] = "fail",
    dtype: speaking.Dtype = "auto",
    device: speaking.Device = "auto",
    quantize: speaking.Quantize = None,
    allow_pickle: speaking.AllowPickle = False,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> None:
    """Score adapters and their base on a file: loss, perplexity, exact match, a task's measures.

    Rows of all adapters share forwards. Loss is on what training would learn: completions, and the
    assistant's turns.

    Example: `multigraft eval heldout.jsonl -a run-1/adapter -a run-2/adapter`
    """
    console = screen(quiet=as_json)
    with console.status("Loading the base and the adapters"):
        kind = _settled(task, data, format)
        ensemble = load_ensemble(
            adapter or [],
            base=base,
            dtype=dtype,
            device=device,
            quantize=quantize,
            allow_pickle=allow_pickle,
            task=kind,
        )
        loaded = load_data(
            data,
            ensemble.common_tokenizer,
            min(max_length, ensemble.longest or max_length),
            format=format,
            on_bad_line=on_bad_line,
            keep_records=True,
            task=kind,
        )
    for line in loaded.bad:
        print(f"multigraft: warning: left out {line}", file=sys.stderr)
    examples, records = loaded.train.examples[:limit], loaded.train.records[:limit]
    with console.status(f"Scoring on {len(examples):,} examples"):
        scores = compare(
            ensemble,
            examples,
            records,
            speaking.speakers_of(ensemble, with_base),
            kind,
            batch_size=batch_size,
            with_answers=answers,
            max_new_tokens=max_new_tokens,
        )
    if as_json:
        found = {"data": data, "base": ensemble.base, "task": kind.name, "examples": len(examples)}
        found |= {"cut": loaded.cut, "left_out": len(loaded.bad)}
        print(json.dumps(found | {"scores": [score.to_dict() for score in scores]}, indent=2))
    else:
        _show(console, loaded, len(examples), scores)


def _settled(task: str, data: str, format: str) -> Task:
    value: Any = task
    if task.lstrip().startswith("{"):
        try:
            value = json.loads(task)
        except ValueError as error:
            raise typer.BadParameter(f"--task {task!r} is no JSON ({error}).") from None
    kind = task_of(value)
    return kind.settled(records_of([data], kind, format))


def _show(console: Console, loaded: Loaded, count: int, scores: list[Score]) -> None:
    further = list(dict.fromkeys(name for score in scores for name in score.measures))
    columns = ["adapter", "loss"]
    has_perplexity = any(score.perplexity is not None for score in scores)
    has_answers = any(score.exact_match is not None for score in scores)
    columns += ["perplexity"] * has_perplexity + ["exact match"] * has_answers + further
    table = Table(columns[0], box=None)
    for column in columns[1:]:
        table.add_column(column, justify="right")
    for score in scores:
        cells = [f"{score.loss:.4f}"]
        cells += [_number(score.perplexity)] * has_perplexity
        cells += [_share(score.exact_match)] * has_answers
        cells += [_number(score.measures.get(name)) for name in further]
        table.add_row(escape(shown(score.speaker)), *cells)
    console.print(table)
    console.print(f"\n{count:,} examples")
    if loaded.cut:
        console.print(f"[yellow]{loaded.cut:,} of the data's were cut to the length[/]")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
