"""``multigraft diff``: what differs between two adapters."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from multigraft.cli.screen import screen, show


def diff(
    first: Annotated[str, typer.Argument(help="An adapter: a directory, or an id on the hub.")],
    second: Annotated[str, typer.Argument(help="The other one.")],
    base: Annotated[
        str | None,
        typer.Option(help="Their base model, for methods whose change needs its weights."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read `.bin` files as well.")
    ] = False,
) -> None:
    """Compare two adapters: their configs, their tensors, and what they change at each site.

    Two files may hold other factors and make the same change, so the changes are compared too.
    Exits like `diff`: 0 when both are the same to the bit, 1 when they differ, 2 after a mistake.

    Example: `multigraft diff run-1/adapter run-2/adapter`
    """
    import multigraft
    from multigraft.train import load_base

    model = None if base is None else load_base(base)
    found = multigraft.diff(first, second, base=model, allow_pickle=allow_pickle)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2, ensure_ascii=False))
    else:
        show(screen(), found)
    raise typer.Exit(0 if found.is_same else 1)
