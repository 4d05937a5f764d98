"""What the verbs draw with: headings, live progress, trees; plain lines where no terminal is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, RichCast
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.tree import Tree

from multigraft.inspection import Node, Structure, outline
from multigraft.train import Evaluated, Event, Finished, OnEvent, Progress, Saved

PLAIN_LINES = 10
"""How many lines a run of one adapter prints where there is no terminal."""
PLAIN_SECONDS = 30
"""After how many seconds there is one more line, though a tenth of the run is not done."""
PLAIN_WIDTH = 120
"""Columns where there is no terminal that has a width of its own."""


def screen(*, quiet: bool = False) -> Console:
    """The console for results, on standard output; a quiet one prints nothing."""
    console = Console(highlight=False, quiet=quiet)
    if console.is_terminal:
        return console
    return Console(highlight=False, width=PLAIN_WIDTH, quiet=quiet)


def heading(console: Console, title: str) -> None:
    """A title with room above it."""
    console.print(f"\n[bold]{escape(title)}[/]\n", soft_wrap=True)


def show(console: Console, table: RichCast) -> None:
    """A table as rich draws it; its plain text, however wide, where there is no terminal."""
    if console.is_terminal:
        console.print(table)
    else:
        console.print(str(table), markup=False, soft_wrap=True)


def tree(structure: Structure) -> Tree:
    """The outline of a structure, drawn."""
    return _grow(outline(structure), None)


@contextmanager
def live(console: Console, adapters: Sequence[str]) -> Iterator[OnEvent]:
    """A callback for training that shows where each of these adapters is, and what it came to."""
    if not console.is_terminal:
        yield _plain(console)
        return
    bars = Bars(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeElapsedColumn(),
        console=console,
    )
    with bars:
        rows: dict[str, TaskID] = {
            name: bars.add_task(name, start=False, total=None, facts="waiting") for name in adapters
        }

        def show(now: Event) -> None:
            if isinstance(now, Progress):
                row = rows[now.adapter]
                bars.start_task(row)
                bars.update(row, total=now.steps, completed=now.step, facts=_facts(now))
                if now.step == now.steps:
                    bars.stop_task(row)
                return
            said = _said(now)
            if said:
                console.print(said, markup=False, soft_wrap=True)
            if isinstance(now, Finished):
                bars.stop_task(rows[now.adapter])

        yield show


def duration(seconds: float) -> str:
    """Seconds as a person says them: ``8 s``, ``2 min 05 s``, ``1 h 20 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _facts(now: Progress) -> str:
    left = "" if now.step == now.steps else f"  {duration(now.seconds_left)} left"
    return f"loss {now.loss:.4f}  {now.tokens_per_second:,.0f} tokens/s{left}"


def _said(now: Event) -> str:
    """A line for what happens besides steps; empty where it goes without saying."""
    if isinstance(now, Evaluated):
        values = "  ".join(f"{name} {value:.4f}" for name, value in now.values.items())
        best = "  (the best so far)" if now.is_best and now.step else ""
        return f"{now.adapter}: step {now.step}/{now.steps}  held-out {values}{best}"
    if isinstance(now, Finished) and now.why == "stopped":
        return f"{now.adapter}: no better evaluation came; stopped, step {now.kept} is kept"
    if isinstance(now, Finished) and now.why == "failed":
        return f"{now.adapter}: failed, and is left as it was after step {now.kept}"
    return f"checkpoint {now.folder}" if isinstance(now, Saved) else ""


def _plain(console: Console) -> OnEvent:
    last_said: dict[str, float] = {}

    def show(now: Event) -> None:
        if not isinstance(now, Progress):
            if _said(now):
                console.print(_said(now), markup=False, soft_wrap=True)
            return
        each = max(1, now.steps // PLAIN_LINES)
        is_due = now.seconds - last_said.get(now.adapter, 0.0) >= PLAIN_SECONDS
        if now.step in (1, now.steps) or now.step % each == 0 or is_due:
            last_said[now.adapter] = now.seconds
            console.print(
                f"{now.adapter}: step {now.step}/{now.steps}  {_facts(now)}",
                markup=False,
            )

    return show


def _grow(node: Node, parent: Tree | None) -> Tree:
    style = "bold" if node.children else "cyan"
    label = f"[{style}]{escape(node.label)}[/]  [dim]{escape(node.note)}[/]"
    branch = Tree(label, guide_style="dim") if parent is None else parent.add(label)
    for child in node.children:
        _grow(child, branch)
    return branch
