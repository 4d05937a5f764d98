"""``multigraft report``: adapters on one page, to look at in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from multigraft.cli.screen import screen


def report(
    adapters: Annotated[
        list[str], typer.Argument(help="Directories, or ids on the hub; one of several means all.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path(
        "report.html"
    ),
    base: Annotated[
        str | None,
        typer.Option(help="Base model, for norms beside its weights, intruders, other methods."),
    ] = None,
    intruder_limit: Annotated[
        int,
        typer.Option(min=0, help="Smaller side of a weight up to which intruders are sought."),
    ] = 1024,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read `.bin` files as well.")
    ] = False,
) -> None:
    """Write a page on adapters: strength by layer, spectra, similarity, ranks, training curves.

    One file that fetches nothing. Without the base, norms are absolute and only adapters of
    low-rank pairs have figures.

    Example: `multigraft report my-adapters/* --base Qwen/Qwen3-0.6B -o report.html`
    """
    from multigraft.report import write_report
    from multigraft.train import load_base

    console = screen()
    model = None if base is None else load_base(base)
    with console.status("Reading the adapters"):
        found = write_report(
            adapters,
            output,
            base=model,
            intruder_limit=intruder_limit,
            allow_pickle=allow_pickle,
        )
    for each in found.adapters:
        line = f"{each.name}: {each.method} at {len(each.sites)} sites, ‖ΔW‖ {each.norm:.3g}"
        relative = f", {each.relative:.2%} of the weights'" if each.relative else ""
        console.print(line + relative, markup=False, soft_wrap=True)
    console.print(f"written: {output}", markup=False, soft_wrap=True)
