"""Arrow models: adapters from disk, and a router over them (`multigraft.variants.arrow`)."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from multigraft.config import PeftConfig, require
from multigraft.errors import UnsupportedError
from multigraft.integrations import announce
from multigraft.methods.lora import LoraConfig
from multigraft.model import PeftModel
from multigraft.roster import Roster
from multigraft.sites import minimal_names
from multigraft.survey import survey
from multigraft.tuner import base_of
from multigraft.variants.arrow import ArrowConfig

ROUTER, TASK, GENERAL = "arrow_router", "task_", "gks_"
"""The router's name, and how those of the others begin."""
WHERE = "create_arrow_model"

Source = str | os.PathLike[str]


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: Sequence[Source],
    arrow_config: ArrowConfig,
    general_adapter_paths: Sequence[Source] | None = None,
    **adapter_kwargs: Any,
) -> PeftModel:
    """A model whose tokens are routed to adapters from disk; the router is the active adapter.

    Args:
        base_model: the base, adapted already or not.
        task_specific_adapter_paths: the experts' directories or hub repositories, with or without a
            subfolder; they become the adapters ``task_0``, ``task_1``, …
        arrow_config: how to route; it is copied.
        general_adapter_paths: adapters of general knowledge, for ``use_gks``: ``gks_0``, …
        adapter_kwargs: arguments of `PeftModel.load_adapter`.

    Raises:
        ConfigError: an argument is not allowed.
        UnsupportedError: the adapters do not act on the same layers, or are no plain pairs.
        CheckpointError: a file does not fit. After any of them, the model is as it was.
    """
    is_config = isinstance(arrow_config, ArrowConfig)
    require(is_config, WHERE, "arrow_config", arrow_config, "an ArrowConfig of Multigraft")
    tasks = _sources("task_specific_adapter_paths", task_specific_adapter_paths)
    general = []
    if arrow_config.use_gks:
        general = _sources("general_adapter_paths", general_adapter_paths)
    named = {f"{TASK}{i}": source for i, source in enumerate(tasks)}
    named |= {f"{GENERAL}{i}": source for i, source in enumerate(general)}
    arrow = copy.deepcopy(arrow_config)
    arrow.task_adapter_names = list(named)[: len(tasks)]
    arrow.gks_adapter_names = list(named)[len(tasks) :]
    roster = Roster.of(base_of(base_model))
    with _all_or_none(roster):
        model: PeftModel | None = None
        for name, source in named.items():
            options = _located(source) | adapter_kwargs
            if model is None:
                model = PeftModel.from_pretrained(base_model, adapter_name=name, **options)
            else:
                model.load_adapter(adapter_name=name, **options)
        assert model is not None
        model.add_adapter(ROUTER, _router(model, list(named), arrow))
        model.set_adapter(ROUTER)
    return model


@contextmanager
def _all_or_none(roster: Roster) -> Iterator[None]:
    """Take out what the block has added if it fails, and let those act that acted before."""
    before, active = set(roster.configs), roster.active
    try:
        yield
    except BaseException:
        from multigraft.wrap import detach

        roster.set_active(active)
        for name in [n for n in roster.configs if n not in before]:
            detach(roster, name)
        announce(roster)
        raise


def _sources(name: str, paths: Any) -> list[Source]:
    """The places to load from, at least one."""
    is_list = isinstance(paths, Sequence) and not isinstance(paths, str) and len(paths) > 0
    are_paths = is_list and all(isinstance(p, (str, os.PathLike)) for p in paths)
    require(are_paths, WHERE, name, paths, "a list of at least one adapter's directory or name")
    return list(paths)


def _located(source: Source) -> dict[str, Any]:
    """Where to load from: a directory, or a hub repository and perhaps a subfolder of it."""
    parts = str(source).strip("/").split("/")
    if Path(source).expanduser().is_dir() or Path(source).is_absolute() or len(parts) < 3:
        return {"model_id": source}
    return {"model_id": "/".join(parts[:2]), "subfolder": "/".join(parts[2:])}


def _router(model: PeftModel, names: Sequence[str], arrow: ArrowConfig) -> PeftConfig:
    """The router's config: it acts where all of these act.

    Raises:
        UnsupportedError: they do not act on the same layers, or are no plain pairs.
    """
    paths, ranks = {}, []
    for name in names:
        sites = set()
        for _, graft in model.roster.grafts(name):
            if graft.method.rides:
                continue
            pair = graft.method.low_rank(graft.params)
            geometry = graft.site.geometry
            if pair is None or geometry is None or not geometry.is_matmul or graft.site.rebinds:
                raise UnsupportedError(
                    f"{WHERE}: `{name}` is more than one plain pair at a linear layer "
                    f"({graft.method.title} at {graft.site}), which Arrow cannot route to."
                )
            sites.add(str(graft.site))
            ranks.append(pair[0].shape[0])
        paths[name] = sites
    first = paths[names[0]]
    for name, sites in paths.items():
        if sites != first:
            only = ", ".join(sorted(sites ^ first)[:3])
            raise UnsupportedError(
                f"{WHERE}: `{name}` and `{names[0]}` do not act on the same layers ({only}). Route "
                "over adapters with the same targets."
            )
    if arrow.use_gks and len(set(ranks)) > 1:
        raise UnsupportedError(
            f"{WHERE}: `use_gks` subtracts A and B, and the adapters' ranks differ "
            f"({sorted(set(ranks))}). Give all of them one rank."
        )
    spots = survey(model.get_base_model())
    targets = minimal_names([s for s in spots if s.path in first], spots)
    return LoraConfig(arrow_config=arrow, target_modules=targets, r=max(ranks))
