"""What of one adapter goes into its files: its config, and its tensors by key on disk.

An adapter that takes a part out of the base's weight (`multigraft.initialisations`) goes in PEFT's
layout, with where A and B began beside them: PEFT's readers derive that from the base. On request
it goes as plain LoRA of twice the rank, which needs no reader that knows of initialisations:

    B A - B₀ A₀ = [B, -B₀] [A; A₀]
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from multigraft import checkpoint
from multigraft.config import PeftConfig
from multigraft.embeddings import embedding_tensors
from multigraft.errors import CheckpointError, ConfigError, MultigraftWarning
from multigraft.graft import Graft
from multigraft.keys import disk_names, strip_prefix
from multigraft.methods.contract import Params
from multigraft.methods.lora import LoRA, LoraConfig
from multigraft.roster import Roster
from multigraft.whole import is_parted, main_rank, wait_for_all

Pathlike = str | os.PathLike[str]


def files_of(
    roster: Roster,
    adapter: str,
    base: nn.Module,
    *,
    gathered: Mapping[str, Tensor] | None = None,
    embeddings: str | bool = False,
    initial: Pathlike | None = None,
) -> tuple[PeftConfig, dict[str, Tensor]]:
    """An adapter's config, and its tensors by key relative to the base model, as they are saved.

    Args:
        gathered: the whole model's state dict to take values from, when the model is sharded.
        embeddings: which of the base's embedding matrices go with it.
        initial: save it as plain LoRA of twice the rank; where the adapter was saved before
            training, which says where A and B began when the adapter does not know.

    Raises:
        CheckpointError: ``initial`` is needed and holds no such adapter, or another one.
        ConfigError: the adapter is no LoRA.
    """
    config = _for_disk(roster.configs[adapter], base)
    state = checkpoint.adapter_state(roster, adapter, gathered, joined=True)
    if initial is not None:
        config, state = _as_plain(roster, adapter, config, state, Path(initial))
    else:
        _drop_starts(roster, adapter, config, state)
    return config, state | embedding_tensors(roster, adapter, embeddings, gathered)


def write_adapters(
    roster: Roster,
    directory: Pathlike,
    names: Iterable[str],
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    embeddings: str | bool = False,
    initial: Pathlike | None = None,
    is_writer: bool = True,
) -> None:
    """Write adapters: ``default`` into the directory, others into a subfolder each; all or none.

    Args:
        state_dict: the whole model's gathered state dict, when the model is sharded.
        embeddings, initial: see `files_of`.
        is_writer: whether this process writes. Where the adapters lie in parts on several, all
            must call, whatever they say, and the first one writes.

    Raises:
        CheckpointError: tensors are missing or the disk refuses; old files are unchanged.
    """
    names = list(names)
    in_parts = any(is_parted(p) for name in names for p in roster.parameters(name))
    if not (is_writer or in_parts):
        return
    root = Path(directory)
    if root.is_file():
        raise CheckpointError(f"`save_directory` (={str(root)!r}) is a file, not a directory.")
    gathered = None
    if state_dict is not None:
        gathered = {strip_prefix(key): value for key, value in state_dict.items()}
    adapters = {}
    for name in names:
        adapters[root if name == "default" else root / name] = files_of(
            roster, name, roster.root, gathered=gathered, embeddings=embeddings, initial=initial
        )
    if adapters and (main_rank() if in_parts else is_writer):
        checkpoint.save(root, adapters)
    if in_parts:
        wait_for_all()


def _for_disk(config: PeftConfig, base: nn.Module) -> PeftConfig:
    config = config.copy()
    # FSDP2 gives a module a class of its own, between it and the one that others can import.
    cls = next(c for c in type(base).__mro__ if not c.__module__.startswith("torch.distributed."))
    if config.task_type is None:
        config.auto_mapping = {
            "base_model_class": cls.__name__,
            "parent_library": cls.__module__,
        }
    return config


def _loras(roster: Roster, adapter: str, config: PeftConfig) -> list[tuple[Graft, dict[str, str]]]:
    """The adapter's pairs, each with the keys on disk of its tensors by name in memory."""
    found = []
    for _, graft in roster.grafts(adapter):
        if isinstance(graft.method, LoRA) and graft.tied is None:
            specs = graft.own_specs.items()
            keys = {n: disk_names(graft.site, s.on_disk or n, config) for n, s in specs}
            found.append((graft, keys))
    return found


def _drop_starts(
    roster: Roster, adapter: str, config: PeftConfig, state: dict[str, Tensor]
) -> None:
    """Leave out where A and B began when the config has been set to say that it is plain LoRA.

    Scripts do so to save what an adapter was before training.
    """
    if not isinstance(config, LoraConfig) or config.init_lora_weights not in (True, False):
        return
    has_moved = False
    for graft, keys in _loras(roster, adapter, config):
        lora = cast(LoRA, graft.method)
        for now, then in lora.starts().items():
            start = state.pop(keys[then], None)
            has_moved |= start is not None and not torch.equal(start, state[keys[now]])
    if has_moved:
        warnings.warn(
            f"adapter `{adapter}` takes a part out of the base's weight, and its config has been "
            "set to say that it does not: its file means another output. Save it with "
            "path_initial_model_for_weight_conversion= to convert it to plain LoRA.",
            MultigraftWarning,
            stacklevel=5,
        )


def _as_plain(
    roster: Roster, adapter: str, config: PeftConfig, state: dict[str, Tensor], initial: Path
) -> tuple[PeftConfig, dict[str, Tensor]]:
    """The same adapter as plain LoRA of twice the rank."""
    loras = _loras(roster, adapter, config)
    if not isinstance(config, LoraConfig) or not loras:
        raise ConfigError(
            f"path_initial_model_for_weight_conversion: adapter `{adapter}` is "
            f"{config.peft_type}; only LoRA's initialisations are converted. Leave it out."
        )
    before = _read(initial)
    state = dict(state)
    for graft, keys in loras:
        lora = cast(LoRA, graft.method)
        if lora.variant is not None and not lora.start.takes_out:
            raise ConfigError(
                f"path_initial_model_for_weight_conversion: {lora.title} at {graft.site} is more "
                "than a pair of factors, and its beginning no part of the base. Leave it out."
            )
        known = {now: state.pop(keys[then]) for now, then in lora.starts().items()}
        start = _start(known, before, keys, lora, initial)
        now = {name: state[keys[name]] for name in (lora.A, lora.B)}
        for name, value in _difference(lora, now, start).items():
            state[keys[name]] = value
    return _of_twice_the_rank(config), state


def _read(initial: Path) -> dict[str, Tensor] | None:
    """The tensors at ``initial``, or None where nothing lies there."""
    if not initial.exists():
        return None
    return checkpoint.read(checkpoint.locate_weights(initial))


def _start(
    known: Params,
    before: Mapping[str, Tensor] | None,
    keys: Mapping[str, str],
    lora: LoRA,
    initial: Path,
) -> Params:
    """Where A and B of one site began: as the adapter knows, or as was saved before training."""
    if known and before is None:
        return known
    try:
        saved = {name: (before or {})[keys[name]] for name in (lora.A, lora.B)}
    except KeyError as error:
        raise CheckpointError(
            f"path_initial_model_for_weight_conversion (={str(initial)!r}) holds no "
            f"{error}, and the adapter does not know where it began. Give the folder in which it "
            "was saved before training."
        ) from None
    for name, value in known.items():
        own = value.to(saved[name])
        if own.shape != saved[name].shape or not torch.allclose(own, saved[name], rtol=1e-2):
            raise CheckpointError(
                f"path_initial_model_for_weight_conversion (={str(initial)!r}): `{keys[name]}` is "
                "not where this adapter began. Give the folder in which it was saved before "
                "training."
            )
    return known or saved


def _difference(lora: LoRA, now: Params, start: Params) -> dict[str, Tensor]:
    """The pair whose product is that of ``now`` less that of ``start``."""
    layer, geometry = lora.site.layer, lora.geometry
    like = now[lora.A]
    a, b = geometry.pairs(layer, now[lora.A], now[lora.B])
    a0, b0 = geometry.pairs(layer, start[lora.A].to(like), start[lora.B].to(like))
    pair = geometry.from_pairs(layer, torch.cat([a, a0], 1), torch.cat([b, -b0], 2))
    return {name: t.contiguous() for name, t in zip((lora.A, lora.B), pair, strict=True)}


def _of_twice_the_rank(config: LoraConfig) -> LoraConfig:
    """The config that gives a pair of twice the rank the same scaling."""
    factor: Any = math.sqrt(2) if config.use_rslora else 2
    config.r *= 2
    config.lora_alpha *= factor
    config.rank_pattern = {key: 2 * rank for key, rank in config.rank_pattern.items()}
    config.alpha_pattern = {key: factor * alpha for key, alpha in config.alpha_pattern.items()}
    config.init_lora_weights = True
    config.eva_config = config.corda_config = config.lora_ga_config = None
    config.loftq_config = {}
    return config
