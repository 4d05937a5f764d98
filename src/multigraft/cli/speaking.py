"""Options that `generate` and `chat` have in common, and how answers of several are shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from multigraft.generation import BASE, Ensemble, Written, shown

Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", "-a", help="Directory, or id on the hub; may be given again."),
]
Base = Annotated[
    str | None, typer.Option(help="Base model [default: the one that the adapters name].")
]
Compare = Annotated[bool, typer.Option("--compare", help="Let the base answer beside them.")]
System = Annotated[str | None, typer.Option(help="What the system is told first.")]
MaxNewTokens = Annotated[int, typer.Option(help="Where an answer that does not end is cut.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token each time.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens of this share.")]
TopK = Annotated[int, typer.Option(help="Draw from so many of the likeliest; 0 means all.")]
Seed = Annotated[int, typer.Option(help="The same one gives the same text.")]
Dtype = Annotated[str, typer.Option(help="Of the base: auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, …")]
Quantize = Annotated[str | None, typer.Option(help="Keep the base in nf4, fp4 or int8.")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Read `.bin` files as well.")]


def speakers_of(ensemble: Ensemble, compare: bool) -> list[str]:
    """All adapters, and the base if it is asked for or is all there is."""
    names = ensemble.adapters
    return [*names, BASE] if compare or not names else names


def as_line(written: Written, **more: object) -> str:
    """An answer as a line of JSON."""
    found = {
        **more,
        "adapter": written.speaker,
        "text": written.text,
        "tokens": written.tokens,
        "finish": "stop" if written.is_finished else "length",
    }
    return json.dumps(found, ensure_ascii=False)


class SideBySide:
    """Columns that grow as answers are written, one a speaker."""

    def __init__(self, console: Console, speakers: Sequence[str]) -> None:
        self.names = [shown(name) for name in speakers]
        self.texts = [""] * len(speakers)
        self.live = Live(self._drawn(), console=console, refresh_per_second=8)

    def __enter__(self) -> SideBySide:
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.update(self._drawn(), refresh=True)
        self.live.stop()

    def add(self, row: int, text: str) -> None:
        """More of one speaker's answer."""
        self.texts[row] += text
        self.live.update(self._drawn())

    def _drawn(self) -> Group:
        table = Table.grid(expand=True, padding=(0, 1))
        panels = []
        for name, text in zip(self.names, self.texts, strict=True):
            table.add_column(ratio=1)
            panels.append(Panel(Text(text), title=Text(name), border_style="cyan"))
        table.add_row(*panels)
        return Group(table)
