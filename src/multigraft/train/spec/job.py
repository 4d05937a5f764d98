"""From what is asked for to a `Job`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection
from typing import Any

from multigraft.auto import PEFT_TYPE_TO_CONFIG_MAPPING
from multigraft.config import PeftConfig
from multigraft.errors import ConfigError, did_you_mean
from multigraft.train.job import AdapterJob, Job
from multigraft.train.recipe import Recipe
from multigraft.train.spec.keys import AdapterKeys, RunSpec
from multigraft.train.spec.sweep import expanded
from multigraft.train.tasks import task_of
from multigraft.train.watch import Watch

RECIPE = tuple(inspect.signature(Recipe).parameters)
NAMES = {"rank": ("r",), "alpha": ("lora_alpha", "alpha"), "dropout": ("lora_dropout", "dropout")}
"""How methods call what every one of them is asked for by the same key."""


def job_of(run: RunSpec) -> Job:
    """The job that a run's file asks for.

    Raises:
        ConfigError: a value is outside what its key allows, or an adapter has no data.
    """
    return Job(
        model=run.model,
        output=run.output,
        adapters=_adapters(run),
        task=task_of(run.task),
        dtype=run.dtype,
        device=run.device,
        quantize=run.quantize,
        gradient_checkpointing=run.gradient_checkpointing,
        save_every=run.save_every,
        keep=run.keep,
        overwrite=run.overwrite,
        resume=run.resume,
        log_to=tuple(run.log_to),
        strategy=run.strategy,
        report=run.report,
    )


def config_of(keys: AdapterKeys, defaults: Collection[str] = ()) -> PeftConfig:
    """The config of the adapter.

    Args:
        defaults: keys that are asked of every adapter, and pass by a method that lacks them.

    Raises:
        ConfigError: its method is unknown, or does not have what is asked of it.
    """
    known = {str(kind).lower(): klass for kind, klass in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kind = keys.method.lower()
    if kind not in known:
        raise ConfigError(
            f"`method` (={keys.method!r}) is unknown.{did_you_mean(kind, known)} Known: "
            f"{', '.join(sorted(known))}."
        )
    klass: Any = known[kind]
    fields = inspect.signature(klass).parameters
    values: dict[str, Any] = {}
    alpha = 2 * keys.rank if keys.alpha is None else keys.alpha
    asked = {"rank": keys.rank, "alpha": alpha, "dropout": keys.dropout}
    for key, value in asked.items():
        own = next((name for name in NAMES[key] if name in fields), None)
        if own is not None:
            values[own] = value
        elif key in keys.model_fields_set and key not in defaults:
            raise ConfigError(
                f"`{key}` (={value!r}): {keys.method} has nothing of the kind. Leave it out, or "
                "give it to the adapters that it is for."
            )
    if "target_modules" in fields:
        values["target_modules"] = targets_of(keys.target_modules)
    unknown = next((name for name in keys.config if name not in fields), None)
    if unknown is not None:
        raise ConfigError(
            f"`config`: {klass.__name__} has no field `{unknown}`.{did_you_mean(unknown, fields)}"
        )
    config: PeftConfig = klass(**{**values, **keys.config})
    if str(config.peft_type) != str(klass().peft_type):
        raise ConfigError(
            f"`config`: `peft_type` (={config.peft_type}) is another method than `method` "
            f"(={keys.method!r}). Leave it out; `method` says what is grafted."
        )
    return config


def targets_of(value: str | list[str] | None) -> str | list[str] | None:
    """A list where there are only names, and commas between them; else one expression."""
    if not isinstance(value, str) or value == "all-linear":
        return value
    names = [name.strip() for name in value.split(",")]
    return names if all(re.fullmatch(r"[\w.-]+", name) for name in names) else value


def _adapters(run: RunSpec) -> tuple[AdapterJob, ...]:
    """All of them; what is wrong with one of several is told with its name."""
    asked = expanded(run)
    of_all = {key for key in NAMES if key in run.model_fields_set}
    found = []
    for keys in asked:
        # With several methods at work, what stands at the top is for those that know it.
        same = {key for key in of_all if getattr(keys, key) == getattr(run, key)}
        defaults = same if len({each.method for each in asked}) > 1 else set()
        try:
            found.append(_adapter(keys, defaults))
        except ConfigError as error:
            if len(asked) == 1 or f"`{keys.name}`" in str(error):
                raise
            raise ConfigError(f"adapter `{keys.name}`: {error}") from error
    return tuple(found)


def _adapter(keys: AdapterKeys, defaults: Collection[str]) -> AdapterJob:
    if keys.data is None:
        raise ConfigError(
            f"adapter `{keys.name}` has no `data`. Give it with the adapter, or at the top for all."
        )
    return AdapterJob(
        data=keys.data,
        config=config_of(keys, defaults),
        recipe=Recipe(**{key: getattr(keys, key) for key in RECIPE}),
        name=keys.name,
        eval_data=keys.eval_data,
        eval_split=keys.eval_split,
        watch=Watch(keys.eval_every, keys.patience, keys.keep_best, keys.measure),
        format=keys.format,
        packing=keys.packing,
        max_length=keys.max_length,
        on_bad_line=keys.on_bad_line,
    )
