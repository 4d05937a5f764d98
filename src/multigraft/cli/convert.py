"""``multigraft convert``: a LoRA from one format into another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from multigraft.cli.screen import screen


def convert(
    source: Annotated[Path, typer.Argument(help="A PEFT folder, or a file of another tool.")],
    to: Annotated[str, typer.Option("--to", help="`peft`, `diffusers`, `kohya` or `gguf`.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The new file; for `peft`, the directory.")
    ],
    part: Annotated[
        str | None, typer.Option(help="The model that a PEFT adapter is of, such as `unet`.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Where the base's `config.json` is, for `gguf`.")
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read pickles as well.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The account, as JSON.")] = False,
) -> None:
    """Convert a LoRA between PEFT, diffusers, kohya's scripts (A1111) and GGUF.

    What it is converted from is seen in the file. A tensor that the new format cannot hold is an
    error, and nothing is written then.

    Example: `multigraft convert style.safetensors --to peft -o style`
    """
    from multigraft import exchange

    outcome = exchange.convert(source, to, output, part=part, base=base, allow_pickle=allow_pickle)
    if as_json:
        print(json.dumps(outcome.to_dict(), indent=2))
    else:
        screen().print(str(outcome), markup=False, soft_wrap=True)
