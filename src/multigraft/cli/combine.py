"""``multigraft combine``: one adapter out of several, from their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from multigraft.cli.screen import screen
from multigraft.combine import RULES
from multigraft.combine.files import Combined, combine_files


def combine(
    adapters: Annotated[list[str], typer.Argument(help="Directories, or ids on the hub.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the new one.")],
    weights: Annotated[
        str | None, typer.Option(help="One each, as in 0.7,0.3 [default: equal shares].")
    ] = None,
    method: Annotated[str, typer.Option("--method", "-m", help=f"{', '.join(RULES)}.")] = "svd",
    rank: Annotated[
        str | None,
        typer.Option("--rank", "-r", help="Of the result, or the energy to keep, as in 0.99."),
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of the elements that stay, for TIES, DARE, pruning.")
    ] = None,
    majority: Annotated[
        str, typer.Option(help="How TIES elects signs: total, frequency.")
    ] = "total",
    clamp: Annotated[
        float | None, typer.Option(help="Quantile at which the decomposition is cut off.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of what DARE leaves out.")] = 0,
    base: Annotated[
        str | None, typer.Option(help="Base model, for adapters that are more than pairs.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an adapter that is there already.")
    ] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read `.bin` files as well.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The account, as JSON.")] = False,
) -> None:
    """Combine adapters of one base into one adapter; the sources stay as they are.

    `cat` is the exact sum, at the sum of the ranks; `svd` the nearest to it of a rank. The base is
    needed for DoRA, saved modules, biases and the like alone, and never loaded into memory.

    Example: `multigraft combine poems code --weights 0.7,0.3 --method ties --density 0.5 -o both`
    """
    made = combine_files(
        adapters,
        output,
        weights=None if weights is None else _numbers(weights),
        method=method,
        rank=None if rank is None else _rank(rank),
        density=density,
        majority=majority,
        clamp=clamp,
        seed=seed,
        base=base,
        overwrite=overwrite,
        allow_pickle=allow_pickle,
    )
    if as_json:
        print(json.dumps(made.to_dict(), indent=2))
    else:
        screen().print(_account(made), markup=False, soft_wrap=True)


def _account(made: Combined) -> str:
    pairs = zip(made.weights, made.adapters, strict=True)
    lines = [f"combined  {' + '.join(f'{w:g} x {a}' for w, a in pairs)}, by {made.method}"]
    if made.ranks is not None:
        low, high = made.ranks
        lines.append(
            f"rank      {low if low == high else f'{low} to {high}'}, at {made.sites} layers"
        )
    if made.error is not None:
        lines.append(f"cut off   at most {made.error:.1%} of a layer's sum")
    if made.base is not None:
        lines.append(f"base      {made.base}, read where it lies")
    return "\n".join([*lines, f"saved in  {made.folder}"])


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--weights {text!r}: give numbers, as in 0.7,0.3.") from None


def _rank(text: str) -> int | float:
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise typer.BadParameter(f"--rank {text!r}: give a rank, or a share as in 0.99.") from None
