"""``multigraft verify``: whether a model with adapters from disk keeps the laws."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from multigraft.cli.screen import screen


def verify(
    places: Annotated[
        list[str], typer.Argument(help="Adapters, side by side; the base model may be among them.")
    ],
    base: Annotated[
        str | None, typer.Option(help="Base model [default: the one that the adapters name].")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Every finding, as JSON.")] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read `.bin` files as well.")
    ] = False,
) -> None:
    """Load a base model with adapters and check it: nests, gaps, torn ties, NaN, dead adapters.

    Exits with 0 when no law is broken (there may be notes), 1 when one is, 2 after a mistake.

    Example: `multigraft verify my-adapters/dates --base Qwen/Qwen3-0.6B`
    """
    import multigraft
    from multigraft.inspection import assemble
    from multigraft.train import load_base

    model = assemble(places, load_base, base=base, allow_pickle=allow_pickle)
    report = multigraft.verify(model)
    if as_json:
        found = {"is_clean": report.is_clean, **dataclasses.asdict(report)}
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        screen().print(str(report), markup=False, soft_wrap=True)
    raise typer.Exit(0 if report.is_clean else 1)
