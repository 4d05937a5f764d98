"""``multigraft generate``: answers to prompts, of several adapters side by side."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from multigraft.cli import speaking
from multigraft.cli.screen import heading, screen
from multigraft.generation import (
    Prompt,
    Sampling,
    Written,
    load_ensemble,
    plain_prompts,
    read_prompts,
    shown,
    write,
)


def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts [default: the lines of standard input].")
    ] = None,
    adapter: speaking.Adapters = None,
    base: speaking.Base = None,
    compare: speaking.Compare = False,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="A line each; or JSONL with `prompt` or `messages`."),
    ] = None,
    system: speaking.System = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Without the tokeniser's chat template.")
    ] = False,
    max_new_tokens: speaking.MaxNewTokens = 256,
    temperature: speaking.Temperature = 0.0,
    top_p: speaking.TopP = 1.0,
    top_k: speaking.TopK = 0,
    seed: speaking.Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at once.")] = 16,
    dtype: speaking.Dtype = "auto",
    device: speaking.Device = "auto",
    quantize: speaking.Quantize = None,
    allow_pickle: speaking.AllowPickle = False,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON an answer.")] = False,
) -> None:
    """Answer prompts with one adapter, with several side by side, or with the base alone.

    Rows of all adapters share batches, so several cost little more than one. A row draws by itself:
    what it says does not depend on what is beside it.

    Example: `multigraft generate "May 1, 1999" -a dates -a records --compare`
    """
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed)
    asked = _asked(prompts, file, system)
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
    speakers = speaking.speakers_of(ensemble, compare)
    answers = write(ensemble, asked, speakers, sampling, raw=raw, batch_size=batch_size)
    for written in answers:
        if as_json:
            print(speaking.as_line(written, prompt=asked[written.prompt].text), flush=True)
        else:
            _show(console, asked, written, is_first=written.speaker == speakers[0])


def _asked(prompts: list[str] | None, file: Path | None, system: str | None) -> list[Prompt]:
    if prompts and file is not None:
        raise typer.BadParameter("prompts stand on the command line or in --file, not in both.")
    if file is not None:
        found = read_prompts(file, system)
    elif prompts:
        found = [Prompt.of(text, system) for text in prompts]
    elif sys.stdin.isatty():
        raise typer.BadParameter("no prompt: give one, a --file, or lines on standard input.")
    else:
        found = plain_prompts(sys.stdin, system)
    if not found:
        raise typer.BadParameter("there is no prompt: every line is empty.")
    return found


def _show(console: Console, asked: list[Prompt], written: Written, *, is_first: bool) -> None:
    if is_first:
        heading(console, asked[written.prompt].text)
    cut = "" if written.is_finished else " …"
    console.print(f"[cyan]{shown(written.speaker):<12}[/] ", end="")
    console.print(written.text.strip() + cut, markup=False, soft_wrap=True)
