"""The keys of a run's file; each is a flag of ``multigraft train`` too.

Types are strict and other keys are refused. Ranges are checked where the values are used.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from multigraft.train.recipe import SCHEDULES, Recipe
from multigraft.train.watch import Watch


class AdapterKeys(BaseModel):
    """What is asked of one adapter. At the top of a file: of all, unless they say otherwise."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str = Field("default", description="Its name; one other than `default` gets a subfolder.")

    data: str | None = Field(
        None,
        description="JSONL, JSON, CSV, Parquet or text file, directory, or id on the hub.",
    )
    eval_data: str | None = Field(None, description="Data to measure on, before and after.")
    eval_split: float | None = Field(
        None, description="Share of the data to hold out for that, e.g. 0.1."
    )
    format: str = Field("auto", description="Of the data; `auto` goes by each row's keys.")
    packing: bool = Field(False, description="Several examples in a row; none sees another.")
    max_length: int = Field(1024, ge=2, description="Longer examples are cut.")
    on_bad_line: str = Field("fail", description="Where a line cannot be used: fail, or skip it.")

    method: str = Field("lora", description="What to graft: lora, loha, ia3, vera, …")
    rank: int = Field(16, description="Rank of the low-rank update.")
    alpha: float | None = Field(
        None, description="The update is scaled by alpha / rank. [default: twice the rank]"
    )
    dropout: float = Field(0.0, description="Dropout of the adapter's input.")
    target_modules: str | list[str] | None = Field(
        "all-linear", description="Names, separated by commas; or one regular expression."
    )
    config: dict[str, Any] = Field(
        default_factory=dict, description="Any other field of the adapter's config, as name=value."
    )

    epochs: float = Field(Recipe.epochs, description="Passes over the data.")
    steps: int | None = Field(None, description="Optimiser steps, in place of epochs.")
    batch_size: int = Field(Recipe.batch_size, description="Examples that run at once.")
    accumulate: int = Field(Recipe.accumulate, description="Batches that make one step.")
    lr: float = Field(Recipe.lr, description="Peak learning rate.")
    schedule: str = Field(Recipe.schedule, description=f"One of {', '.join(SCHEDULES)}.")
    warmup: float = Field(
        Recipe.warmup, description="Share of the steps, or from 1 on their number."
    )
    weight_decay: float = Field(Recipe.weight_decay, description="The optimiser's.")
    clip: float = Field(Recipe.clip, description="Largest norm of the gradient; 0 clips nothing.")
    group_by_length: bool = Field(False, description="Examples of like length share a batch.")
    seed: int = Field(Recipe.seed, description="Initial values, order and dropout.")
    optimizer: str = Field(Recipe.optimizer, description="By name: adamw, sgd, …")
    optimizer_options: dict[str, Any] = Field(
        default_factory=dict, description="What the optimiser takes besides, as name=value."
    )

    eval_every: int | None = Field(None, description="Steps between evaluations.")
    patience: int | None = Field(
        None, description="Evaluations without a better one after which learning stops."
    )
    keep_best: bool = Field(
        Watch.keep_best, description="Keep the values of the best evaluation, not the last ones."
    )
    measure: str = Field(Watch.measure, description="What evaluations are compared by.")


class AdapterSpec(AdapterKeys):
    """One adapter of a run's list; its name is its own."""

    name: str


class RunSpec(AdapterKeys):
    """A run's file."""

    model: str = Field(description="Base model: a directory, or an id on the hub.")
    output: str = Field(description="Directory for the adapters.")
    adapters: list[AdapterSpec] | None = Field(
        None, description="Several adapters, each with keys of its own, as YAML."
    )
    sweep: dict[str, list[Any]] | None = Field(
        None, description="An adapter for every combination, as rank=[8,16]."
    )
    task: str | dict[str, Any] = Field("causal-lm", description="What is learned.")
    dtype: str = Field("auto", description="Of the base: auto, float32, bfloat16 or float16.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps, …")
    quantize: str | None = Field(
        None, description="Keep the base's linear layers in nf4, fp4 or int8."
    )
    gradient_checkpointing: bool = Field(
        False, description="Compute activations twice, to save memory."
    )
    save_every: int = Field(500, description="Steps between checkpoints; 0 writes none.")
    keep: int = Field(2, description="How many checkpoints are kept.")
    overwrite: bool = Field(False, description="Replace what is there already.")
    resume: bool = Field(False, description="Go on from the last checkpoint.")
    log_to: list[str] = Field(
        default_factory=list, description="Trackers for the curves: tensorboard, wandb, trackio."
    )
    report: bool = Field(True, description="Write a page on the adapters at the end.")
    strategy: str = Field("ddp", description="Of several processes: ddp, fsdp or tp.")
    timeout: float = Field(600.0, description="Seconds until a process that hangs is given up.")
