"""``multigraft preview``: what of your data is trained on, and what is masked."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from multigraft.cli.screen import heading, screen
from multigraft.cli.spec import name_or_mapping
from multigraft.train import Preview, Shown, formats, load_tokenizer
from multigraft.train import preview as look
from multigraft.train.tasks import TASKS

LEARNED, MASKED = "bold green", "dim"
OPENING, CLOSING = "⟦", "⟧"
"""Around what is learned where there are no colours."""
BAD_SHOWN = 20
TOKENS = "tokens"


def preview(
    data: Annotated[str, typer.Argument(help="As for `multigraft train --data`.")],
    model: Annotated[str, typer.Option(help="Whose tokeniser and chat template to use.")],
    format: Annotated[str, typer.Option(help=f"Of the data: {', '.join(formats())}.")] = "auto",
    task: Annotated[
        str, typer.Option(help=f"What is learned: {', '.join(TASKS)}; or {{name: …, …}}.")
    ] = "causal-lm",
    limit: Annotated[int, typer.Option(min=0, help="How many examples to show.")] = 3,
    max_length: Annotated[int, typer.Option(min=2, help="Longer examples are cut.")] = 1024,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show what of the data is trained on (green) and what is masked (dim), and every bad line.

    All of the data is read and tokenised as training would; no weights are loaded. Without colours,
    what is trained on stands in ⟦brackets⟧.

    Exits with 0 when every line can be used, 1 when some cannot, 2 after a mistake.

    Example: `multigraft preview chats.jsonl --model Qwen/Qwen3-0.6B --limit 1`

    Example: `multigraft preview reviews.csv --model bert-base-uncased --task seq-cls`
    """
    tokenizer, chosen = load_tokenizer(model), name_or_mapping(task)
    seen = look(data, tokenizer, max_length=max_length, format=format, limit=limit, task=chosen)
    if as_json:
        print(json.dumps(_as_dict(seen), indent=2, ensure_ascii=False))
    else:
        _show(screen(), seen, max_length)
    raise typer.Exit(1 if seen.bad else 0)


def _show(console: Console, seen: Preview, max_length: int) -> None:
    for shown in seen.shown:
        heading(console, f"{shown.file}:{shown.line}")
        console.print(_drawn(shown, has_colours=console.color_system is not None), soft_wrap=True)
        console.print(f"[dim]{_counted(shown.learned, shown.tokens, seen.unit)}[/]")
    heading(console, "Summary")
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(seen.kinds.items()))
    console.print(f"records   {kinds or 'none'}; {len(seen.lengths):,} examples")
    if seen.lengths:
        ordered = sorted(seen.lengths)
        middle, total = ordered[len(ordered) // 2], sum(ordered)
        console.print(f"length    {ordered[0]} to {ordered[-1]} tokens, median {middle}")
        share = f", of which {seen.learned / total:.1%} are trained on"
        console.print(f"tokens    {total:,}{share if seen.unit == TOKENS else ''}")
        if seen.unit != TOKENS:
            console.print(f"{seen.unit:<10}{seen.learned:,}")
        if labels := seen.task.get("labels"):
            console.print(f"classes   {escape(', '.join(labels))}", soft_wrap=True)
    if seen.cut:
        console.print(f"[yellow]cut       {seen.cut:,} are longer than {max_length} tokens[/]")
    for line in seen.bad[:BAD_SHOWN]:
        console.print(f"[yellow]bad[/]       {escape(str(line))}", soft_wrap=True)
    if len(seen.bad) > BAD_SHOWN:
        console.print(f"… and {len(seen.bad) - BAD_SHOWN:,} more bad lines; --json lists them all")


def _counted(learned: int, tokens: int, unit: str) -> str:
    """What is trained on; where it is no tokens, the tokens that it is learned from."""
    if unit == TOKENS:
        return f"{learned:,} of {tokens:,} tokens are trained on"
    return f"{learned:,} {unit if learned != 1 else unit[:-1]} from {tokens:,} tokens"


def _drawn(shown: Shown, *, has_colours: bool) -> Text:
    text = Text()
    for span in shown.spans:
        words = span.text
        if span.learned and not has_colours:
            words = f"{OPENING}{words}{CLOSING}"
        text.append(words, LEARNED if span.learned else MASKED)
    return text


def _as_dict(seen: Preview) -> dict[str, object]:
    return {"is_clean": not seen.bad, **dataclasses.asdict(seen)}
