"""``multigraft inspect``: what hangs where, for adapters on disk."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from multigraft.cli.screen import screen, show


def inspect(
    places: Annotated[
        list[str], typer.Argument(help="Adapters, side by side; or one base model, or both.")
    ],
    base: Annotated[
        str | None, typer.Option(help="Base model [default: the one that the adapters name].")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Every site, as JSON.")] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read `.bin` files as well.")
    ] = False,
) -> None:
    """Show the structure of a base model with adapters from disk on it.

    Of the base only `config.json` is read, so everything is on the meta device.

    Example: `multigraft inspect my-adapters/dates my-adapters/records`
    """
    import multigraft
    from multigraft.inspection import assemble
    from multigraft.train import load_skeleton

    model = assemble(places, load_skeleton, base=base, allow_pickle=allow_pickle)
    structure = multigraft.inspect(model)
    if as_json:
        print(json.dumps(dataclasses.asdict(structure), indent=2, ensure_ascii=False))
    else:
        show(screen(), structure)
