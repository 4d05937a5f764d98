"""``multigraft merge``: adapters into their base, as a model of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from multigraft.cli.screen import screen
from multigraft.merging import CHECKS, Merged, merge_files


def merge(
    adapters: Annotated[
        list[str], typer.Argument(help="Directories, or ids on the hub; all of them are merged.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the new model.")],
    base: Annotated[
        str | None, typer.Option(help="Base model [default: the one that the adapters name].")
    ] = None,
    check: Annotated[
        str, typer.Option(help=f"How the result is checked: {' or '.join(CHECKS)}.")
    ] = CHECKS[0],
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="What to compare outputs on; may be given again [default: random]."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the directory if it is there.")
    ] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read adapters' `.bin` files as well.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The account, as JSON.")] = False,
) -> None:
    """Merge adapters into their base model and write the result, layer by layer.

    The adapters and one layer at a time are in memory, never the whole model. Nothing has the
    output's name before the new model's outputs were compared with the adapters'.

    Example: `multigraft merge my-adapter --base Qwen/Qwen3-0.6B -o merged`
    """
    console = screen(quiet=as_json)
    with console.status("Reading the base and the adapters") as status:
        merged = merge_files(
            adapters,
            output,
            base=base,
            check=check,
            prompts=prompt or [],
            overwrite=overwrite,
            allow_pickle=allow_pickle,
            on_layer=lambda done, total: status.update(f"Merging: {done} of {total} layers"),
        )
    if as_json:
        print(json.dumps(merged.to_dict(), indent=2))
    else:
        _show(console, merged)


def _show(console: Console, merged: Merged) -> None:
    lines = [
        f"merged    {', '.join(merged.adapters)} into {merged.base}: {merged.layers} layers, "
        f"{merged.different} of {merged.tensors} tensors differ from the base's"
    ]
    if merged.untied:
        lines.append(f"untied    {', '.join(merged.untied)}")
    found = merged.verdict
    if found is None:
        lines.append("checked   no")
    else:
        lines.append(
            f"checked   outputs differ from the adapters' by {found.difference:.3g}, and those "
            f"from the base's by {found.change:.3g}; the same first choice at "
            f"{found.agreement:.1%} of {found.places} places"
        )
        if not found.is_telling:
            lines.append("note      the adapters change these outputs less than rounding does")
    lines.append(f"saved in  {merged.folder} ({merged.bytes / 1e9:,.2f} GB)")
    console.print("\n".join(lines), markup=False, soft_wrap=True)
