"""``multigraft chat``: a conversation with adapters, in a terminal or through a pipe."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Console

from multigraft.cli import speaking
from multigraft.cli.screen import screen
from multigraft.errors import MultigraftError
from multigraft.generation import Conversation, Sampling, Written, load_ensemble, shown


def chat(
    adapter: speaking.Adapters = None,
    base: speaking.Base = None,
    compare: speaking.Compare = False,
    system: speaking.System = None,
    max_new_tokens: speaking.MaxNewTokens = 512,
    temperature: speaking.Temperature = 0.7,
    top_p: speaking.TopP = 0.95,
    top_k: speaking.TopK = 0,
    seed: speaking.Seed = 0,
    dtype: speaking.Dtype = "auto",
    device: speaking.Device = "auto",
    quantize: speaking.Quantize = None,
    allow_pickle: speaking.AllowPickle = False,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON an answer.")] = False,
) -> None:
    """Talk with one adapter, or with several side by side, each with a history of its own.

    Lines that begin with a slash are commands: /adapter NAME, /compare, /reset, /system TEXT,
    /temperature NUMBER, /help, /exit. Ctrl-C stops an answer. From a pipe, each line is a turn.

    Example: `multigraft chat -a my-adapter --compare`
    """
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed)
    console = screen(quiet=as_json)
    with console.status("Loading the base and the adapters"):
        ensemble = load_ensemble(
            adapter or [],
            base=base,
            dtype=dtype,
            device=device,
            quantize=quantize,
            allow_pickle=allow_pickle,
        )
    talk = Conversation(ensemble, speaking.speakers_of(ensemble, compare), sampling, system)
    if console.is_terminal and sys.stdin.isatty():
        console.print(f"[dim]{ensemble.base}. Type /help for the commands.[/]")
    for line in _lines():
        _turn(console, talk, line, as_json=as_json)
        if talk.is_over:
            return


def _lines() -> Iterator[str]:
    """What the user types, or what comes through the pipe."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives `input` a history)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        if line:
            yield line


def _turn(console: Console, talk: Conversation, line: str, *, as_json: bool) -> None:
    try:
        if line.startswith("/"):
            said = talk.do(line)
            if said:
                console.print(said, style="dim", markup=False, soft_wrap=True)
        elif as_json:
            turn = talk.count
            for written in talk.say(line):
                print(speaking.as_line(written, turn=turn, prompt=line), flush=True)
        else:
            _answer(console, talk, line)
    except MultigraftError as error:  # the conversation goes on
        print(f"multigraft: {error}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        console.print("[dim](stopped; not part of the conversation)[/]")


def _answer(console: Console, talk: Conversation, line: str) -> None:
    if len(talk.speakers) == 1:
        console.print(f"[cyan]{shown(talk.speakers[0])}>[/] ", end="")
        talk.say(line, lambda row, text: console.print(text, end="", markup=False, soft_wrap=True))
        console.print()
    elif console.is_terminal:
        with speaking.SideBySide(console, talk.speakers) as columns:
            talk.say(line, columns.add)
    else:
        for written in talk.say(line):
            _block(console, written)


def _block(console: Console, written: Written) -> None:
    console.print(f"[cyan]{shown(written.speaker)}>[/] ", end="")
    console.print(written.text, markup=False, soft_wrap=True)
