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
RUN = (".yaml", ".yml")


def plan(
    model: Annotated[
        str, typer.Argument(help="Base model: a directory, or an id on the hub. Or a run's file.")
    ],
    target: Annotated[
        Names,
        typer.Option("--target", "-t", help="Names of modules, `all-linear`, or one expression."),
    ] = None,
    method: Annotated[str | None, typer.Option("--method", "-m", help="lora, vera, …")] = None,
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
    batch_size: Annotated[
        int | None, typer.Option(help="Rows of each adapter. [default: 8]")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a row. [default: 1024]")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the base: auto, float32, bfloat16 or float16.")
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(help="The base's linear layers: nf4, fp4 or int8.")
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="adamw, adamw8bit, sgd, … [default: adamw]")
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option(help="Compute blocks again, to save memory.")
    ] = None,
    accumulate: Annotated[
        int | None, typer.Option(help="Parts of a step, one after another. [default: 1]")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="What there is, as in 80GiB. [default: the GPU's, if any]")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Whose kernels count: cuda or cpu. [default: cuda]")
    ] = None,
    gpus: Annotated[
        str | None, typer.Option(help="How many, as in 8 or 8,64,512; rows are those of each.")
    ] = None,
    strategy: Annotated[
        str | None, typer.Option(help="Of several GPUs: ddp, fsdp, tp or zero3. [default: fsdp]")
    ] = None,
    link: Annotated[str, typer.Option(help="Bytes that a GPU sends in a second.")] = "50GB",
    speed: Annotated[str, typer.Option(help="Operations of a GPU in a second.")] = "400T",
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> None:
    """Show what a training step takes, by part, and the largest batch that fits.

    Reads the model's `config.json` alone: no weights, and next to no memory. Exits with 1 if the
    step does not fit, after saying what would help and by how much. With `--gpus`, what each GPU
    holds and sends; seconds are estimates from `--link` and `--speed`. Of a run's file, every
    adapter is counted.

    Example: `multigraft plan Qwen/Qwen3-0.6B --rank 16 --batch-size 8 --memory 24GiB`

    Example: `multigraft plan run.yaml --memory 80GiB --gpus 1,8,64 --strategy fsdp`
    """
    given = {
        "batch_size": batch_size,
        "max_length": max_length,
        "dtype": dtype,
        "quantize": quantize,
        "optimizer": optimizer,
        "gradient_checkpointing": gradient_checkpointing,
        "accumulate": accumulate,
        "device": device,
    }
    options = {name: value for name, value in given.items() if value is not None}
    spec = {"target_modules": names_or_expression(target), "rank": rank, **settings(more)}
    counts = [1] if gpus is None else _counts(gpus)
    requests, usual = _requests(model, method, spec, config or [], options, memory, counts)
    if gpus is None:
        fits = _one(requests[1], as_json)
    else:
        fits = _many(requests, strategy or usual, link, speed, as_json)
    raise typer.Exit(0 if fits else 1)


def _requests(
    model: str,
    method: str | None,
    spec: dict[str, Any],
    folders: list[Path],
    options: dict[str, Any],
    memory: str | None,
    counts: list[int],
) -> tuple[dict[int, Any], str]:
    """What each of so many GPUs is asked to do, and the strategy where none is named."""
    from multigraft import planning

    names = {name: value for name, value in spec.items() if value is not None}
    if not model.endswith(RUN):
        configs = _configs(folders, method, names)
        one = planning.Request(model, configs, memory=memory, **options)
        return dict.fromkeys(counts, one), "fsdp"
    if names or method or folders:
        raise typer.BadParameter("a run's file says what its adapters are.")
    from multigraft.train.spec import job_of, read_run

    job = job_of(read_run(Path(model), options))
    return {n: planning.request_of(job, memory=memory, gpus=n) for n in counts}, job.strategy


def _configs(folders: list[Path], method: str | None, fields: dict[str, Any]) -> dict[str, Any]:
    """The adapters' configs by name: those of directories, or the one that options describe."""
    import multigraft
    from multigraft.inspection import config_for

    if not folders:
        kind = method or "lora"
        usual = AS_TRAINED.get(kind.lower())
        return {"default": config_for(kind, {"target_modules": usual, **fields})}
    if fields or method:
        raise typer.BadParameter("--config stands in place of the options that describe one.")
    read = multigraft.PeftConfig.from_pretrained
    return {f"{number}-{path.name}": read(path) for number, path in enumerate(folders, 1)}


def _one(request: Any, as_json: bool) -> bool:
    from multigraft import planning

    found = planning.planned(request)
    remedies = planning.remedies(found) if found.fits is False else []
    if as_json:
        print(json.dumps(planning.as_data(found, remedies), indent=2))
    else:
        screen().print(planning.text(found, remedies), markup=False, soft_wrap=True)
    return found.fits is not False


def _many(requests: dict[int, Any], strategy: str, link: str, speed: str, as_json: bool) -> bool:
    from multigraft import planning

    found = list(planning.spread_over(requests, strategy, link=link, speed=speed))
    if as_json:
        print(json.dumps(planning.as_rows(found), indent=2))
    else:
        lines = (planning.cluster_table(found), "", planning.notes(found[0]))
        screen().print("\n".join(lines), markup=False, soft_wrap=True)
    return any(each.fits is not False for each in found)


def _counts(value: str) -> list[int]:
    try:
        return [int(part) for part in value.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{value!r}: GPUs are counted, as in 8 or 8,64,512.") from None
