"""``multigraft plan``: what a training step takes, before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from multigraft.cli.screen import screen
from multigraft.cli.spec import names_or_expression, settings

Names = list[str] | None
AS_TRAINED = {"lora": "all-linear"}
"""Targets that `multigraft train` takes where none are named."""


def plan(
    model: Annotated[str, typer.Argument(help="Base model: a directory, or an id on the hub.")],
    target: Annotated[
        Names,
        typer.Option("--target", "-t", help="Names of modules, `all-linear`, or one expression."),
    ] = None,
    method: Annotated[str, typer.Option("--method", "-m", help="lora, vera, ia3, …")] = "lora",
    rank: Annotated[
        int | None, typer.Option("--rank", "-r", help="Rank, where it has one.")
    ] = None,
    more: Annotated[
        Names, typer.Option("--set", help="Any other field of the config, as in use_dora=true.")
    ] = None,
    config: Annotated[
        list[Path] | None,
        typer.Option(
            help="An adapter's directory, whose config counts in place of options; repeat it for "
            "adapters that learn side by side."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows of each adapter.")] = 8,
    max_length: Annotated[int, typer.Option(help="Tokens of a row.")] = 1024,
    dtype: Annotated[
        str, typer.Option(help="Of the base: auto, float32, bfloat16 or float16.")
    ] = "auto",
    quantize: Annotated[
        str | None, typer.Option(help="The base's linear layers: nf4, fp4 or int8.")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="adamw, adamw8bit, sgd, …")] = "adamw",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute blocks again, to save memory.")
    ] = False,
    accumulate: Annotated[int, typer.Option(help="Parts of a step, one after another.")] = 1,
    memory: Annotated[
        str | None, typer.Option(help="What there is, as in 80GiB. [default: the GPU's, if any]")
    ] = None,
    device: Annotated[str, typer.Option(help="Whose kernels count: cuda or cpu.")] = "cuda",
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> None:
    """Show what a training step takes, by part, and the largest batch that fits.

    Reads the model's `config.json` alone: no weights, and next to no memory. Exits with 1 if the
    step does not fit, after saying what would help and by how much.

    Example: `multigraft plan Qwen/Qwen3-0.6B --rank 16 --batch-size 8 --memory 24GiB`
    """
    from multigraft import planning

    found = planning.plan(
        model,
        _configs(config, target, method, rank, more),
        batch_size=batch_size,
        max_length=max_length,
        dtype=dtype,
        quantize=quantize,
        optimizer=optimizer,
        gradient_checkpointing=gradient_checkpointing,
        accumulate=accumulate,
        memory=memory,
        device=device,
    )
    remedies = planning.remedies(found) if found.fits is False else []
    if as_json:
        print(json.dumps(planning.as_data(found, remedies), indent=2))
    else:
        screen().print(planning.text(found, remedies), markup=False, soft_wrap=True)
    raise typer.Exit(1 if found.fits is False else 0)


def _configs(
    folders: list[Path] | None, target: Names, method: str, rank: int | None, more: Names
) -> dict[str, Any]:
    """The adapters' configs by name: those of directories, or the one that options describe."""
    import multigraft
    from multigraft.inspection import config_for

    fields = {"target_modules": names_or_expression(target), "rank": rank, **settings(more)}
    if not folders:
        fields["target_modules"] = fields["target_modules"] or AS_TRAINED.get(method.lower())
        return {"default": config_for(method, fields)}
    if any(value is not None for value in fields.values()):
        raise typer.BadParameter("--config stands in place of the options that describe one.")
    read = multigraft.PeftConfig.from_pretrained
    return {f"{number}-{path.name}": read(path) for number, path in enumerate(folders, 1)}
