"""``multigraft export``: an adapter in the form that another program reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from multigraft.cli.screen import screen


def export(
    adapter: Annotated[str, typer.Argument(help="A directory, or an id on the hub.")],
    consumer: Annotated[str, typer.Option("--for", help="`vllm`, `sglang`, `gguf` or `ollama`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the new files.")],
    base: Annotated[
        str | None,
        typer.Option(help="The base model: names and sizes are compared with its config."),
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read `.bin` files as well.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The account, as JSON.")] = False,
) -> None:
    """Write an adapter for vLLM, SGLang, llama.cpp or Ollama, so that all of it is read there.

    Scales and ranks per layer go into the matrices; what cannot be rewritten exactly is refused.

    Example: `multigraft export my-adapter --for vllm -o my-adapter-vllm`
    """
    from multigraft import exchange

    outcome = exchange.export(adapter, consumer, output, base=base, allow_pickle=allow_pickle)
    if as_json:
        print(json.dumps(outcome.to_dict(), indent=2))
    else:
        screen().print(str(outcome), markup=False, soft_wrap=True)
