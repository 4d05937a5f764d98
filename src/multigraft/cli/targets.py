"""``multigraft targets``: a dry run of what a config means on a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from multigraft.cli.screen import screen, show
from multigraft.cli.spec import layers, names_or_expression, settings

Names = list[str] | None


def targets(
    model: Annotated[str, typer.Argument(help="Base model: a directory, or an id on the hub.")],
    target: Annotated[
        Names,
        typer.Option(
            "--target",
            "-t",
            help="Names of modules, `all-linear`, or one expression for whole paths "
            "[default: the architecture's usual ones].",
        ),
    ] = None,
    exclude: Annotated[Names, typer.Option(help="Names, or one expression, to leave out.")] = None,
    only_layers: Annotated[
        str | None, typer.Option("--layers", help="Indices of layers, as in 0-3,7.")
    ] = None,
    layers_pattern: Annotated[
        str | None, typer.Option(help="Name of the list that holds the layers.")
    ] = None,
    method: Annotated[str, typer.Option("--method", "-m", help="lora, vera, ia3, …")] = "lora",
    rank: Annotated[
        int | None, typer.Option("--rank", "-r", help="Rank, where it has one.")
    ] = None,
    rank_pattern: Annotated[
        Names, typer.Option(help="Another rank for some modules, as in down_proj=4.")
    ] = None,
    parameter: Annotated[Names, typer.Option(help="Parameters to adapt by themselves.")] = None,
    save_module: Annotated[Names, typer.Option(help="Modules to train whole copies of.")] = None,
    more: Annotated[
        Names, typer.Option("--set", help="Any other field of the config, as in use_dora=true.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="An adapter's directory, whose config counts in place of options."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Every module, as JSON.")] = False,
) -> None:
    """Show which modules a config means on a model, why, and what an adapter there would take.

    Reads the model's `config.json` alone: no weights, and next to no memory. Exits with 1 if the
    config could not be attached.

    Example: `multigraft targets Qwen/Qwen3-0.6B --target q_proj,v_proj --layers 0-9 --rank 8`
    """
    import multigraft
    from multigraft.inspection import config_for
    from multigraft.train import load_skeleton

    fields: dict[str, Any] = {
        "target_modules": names_or_expression(target),
        "exclude_modules": names_or_expression(exclude),
        "layers_to_transform": layers(only_layers),
        "layers_pattern": layers_pattern,
        "rank": rank,
        "rank_pattern": settings(rank_pattern) or None,
        "target_parameters": parameter,
        "modules_to_save": save_module,
        **settings(more),
    }
    if config is not None and any(value is not None for value in fields.values()):
        raise typer.BadParameter("--config stands in place of the options that describe one.")
    spec = multigraft.PeftConfig.from_pretrained(config) if config else config_for(method, fields)
    plan = multigraft.targets(load_skeleton(model), spec)
    if as_json:
        print(json.dumps(plan.to_dict(), indent=2, ensure_ascii=False))
    else:
        show(screen(), plan)
    raise typer.Exit(0 if plan.fits else 1)
