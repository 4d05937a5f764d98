"""``multigraft doctor``: what is wrong with an adapter's files, and mending it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from multigraft.cli.screen import screen


def doctor(
    adapter: Annotated[
        str, typer.Argument(help="A directory, a file of tensors, or an id on the hub.")
    ],
    base: Annotated[
        str | None,
        typer.Option(help="The base model, of which `config.json` alone is read."),
    ] = None,
    fix: Annotated[bool, typer.Option("--fix", help="Rewrite what is safe to rewrite.")] = False,
    un_nest: Annotated[
        bool,
        typer.Option("--un-nest", help="Fold adapters inside the adapter into its own matrices."),
    ] = False,
    drop_nested: Annotated[
        bool, typer.Option("--drop-nested", help="Leave out adapters inside the adapter.")
    ] = False,
    nested: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of an adapter inside, for the scale that its config tells."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Directory for the new files [default: in place]."),
    ] = None,
    adapter_name: Annotated[
        str | None, typer.Option("--adapter", help="Whose tensors count, where a file has several.")
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read `.bin` files as well.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> None:
    """Examine an adapter's files, without loading the base, and mend them if asked to.

    Exits with 0 when nothing is wrong, 1 when something is, 2 after a mistake. Files that are
    rewritten in place are kept beside the new ones, as `.bak`.

    Example: `multigraft doctor my-adapter --base Qwen/Qwen3-0.6B`
    """
    import multigraft

    found = multigraft.doctor(
        adapter,
        base,
        fix=fix,
        un_nest=un_nest,
        drop_nested=drop_nested,
        nested=nested or [],
        output=output,
        adapter_name=adapter_name,
        allow_pickle=allow_pickle,
    )
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        screen().print(str(found), markup=False, soft_wrap=True)
    raise typer.Exit(0 if found.is_healthy else 1)
