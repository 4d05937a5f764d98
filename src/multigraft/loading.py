"""Loading an adapter's files onto a model: read, compare, and only then attach or overwrite."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from multigraft import checkpoint, hub
from multigraft.config import CONFIG_NAME, PeftConfig
from multigraft.containers import check_name
from multigraft.embeddings import take_embeddings
from multigraft.errors import CheckpointError, MultigraftWarning, SourceError, StateError
from multigraft.keys import full_key, placed
from multigraft.per_expert import PerExpert
from multigraft.prepare import Prepared, own_copy, prepare
from multigraft.reading import shown
from multigraft.state import drop_base_tensors, write
from multigraft.survey import Spot, survey
from multigraft.tuner import Tuner
from multigraft.whole import full_shape
from multigraft.wrap import exchange

HUB_OPTIONS = hub.OPTIONS


def read_config(
    source: str | os.PathLike[str], adapter: str, options: Mapping[str, Any]
) -> tuple[PeftConfig, dict[str, Any]]:
    """The config at ``source`` and the options to find its weights: of the same commit.

    A place without a config of its own that holds one adapter in a subfolder (as is written for an
    adapter of another name than ``default``) means that adapter.
    """
    options = dict(options)
    where = {k: v for k, v in options.items() if k in (*HUB_OPTIONS, "subfolder")}
    try:
        path = checkpoint.locate(source, CONFIG_NAME, **where)
    except SourceError as error:
        path = _in_a_subfolder(error, source, adapter, where)
        options["subfolder"] = path.parent.name
    commit = hub.commit_of(path)
    if commit is not None:  # a branch may have moved on before the weights are fetched
        options["revision"] = commit
    return PeftConfig.from_dict(PeftConfig.from_json_file(path)), options


def _in_a_subfolder(
    error: SourceError, source: str | os.PathLike[str], adapter: str, where: Mapping[str, Any]
) -> Path:
    """The config of the adapter of this name, or of the only one there; else the error goes on."""
    if where.get("subfolder") or not error.lacks_file:
        raise error
    folder = Path(source)
    if folder.is_dir():
        inside = [p.parent.name for p in sorted(folder.glob(f"*/{CONFIG_NAME}"))]
    else:
        inside = [] if error.is_cut_off else hub.folders_with(str(source), CONFIG_NAME, where)
        if not inside:  # nobody can list it now; the cache may have it
            inside, where = [adapter], {**where, "local_files_only": True}
    chosen = adapter if adapter in inside else inside[0] if len(inside) == 1 else None
    if chosen is None:
        raise error
    try:
        return checkpoint.locate(source, CONFIG_NAME, **{**where, "subfolder": chosen})
    except SourceError:
        raise error from None


def load_peft_weights(
    model_id: str | os.PathLike[str],
    device: str | torch.device | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **hub: Any,
) -> dict[str, Tensor]:
    """An adapter's tensors by their names on disk, from a directory or the hub.

    Args:
        device: where they go; to the accelerator by default, if there is one.
        key_mapping: regular expressions to replacements, for keys without their prefix.
        hub: `revision`, `subfolder`, `token` and others; ``allow_pickle=True`` for old files.

    Raises:
        CheckpointError: there are none, or they are damaged.
    """
    allow_pickle = bool(hub.pop("allow_pickle", False))
    path = checkpoint.locate_weights(model_id, **hub)
    tensors = checkpoint.rename(checkpoint.read(path, allow_pickle=allow_pickle), key_mapping)
    if device is None:
        device = torch.accelerator.current_accelerator() or "cpu"
    return {full_key(key): tensor.to(device) for key, tensor in tensors.items()}


def load_into(
    tuner: Tuner,
    source: str | os.PathLike[str],
    adapter: str,
    *,
    is_trainable: bool = False,
    autocast: bool = True,
    device: str | None = None,
    key_mapping: Mapping[str, str] | None = None,
    strict: bool = True,
    ignore_mismatched_sizes: bool = False,
    config: PeftConfig | None = None,
    activate: bool | None = None,
    allow_pickle: bool = False,
    hotswap: bool = False,
    **options: Any,
) -> checkpoint.LoadReport:
    """Load one adapter; see `PeftModel.load_adapter` for the arguments."""
    if hotswap:
        from multigraft.hotswap import hotswap_adapter

        hotswap_adapter(tuner, source, adapter, **options)
        return checkpoint.LoadReport()
    check_name(adapter)
    check_options(options)
    if config is None:
        config, options = read_config(source, adapter, options)
    config = own_copy(config)
    config.inference_mode = not is_trainable
    where = {k: v for k, v in options.items() if k in (*HUB_OPTIONS, "subfolder")}
    tensors = checkpoint.read(checkpoint.locate_weights(source, **where), allow_pickle=allow_pickle)
    tensors = checkpoint.rename(tensors, key_mapping)
    per_expert = PerExpert(tuner.model, config, tensors)
    name_what_was_saved(config, per_expert.rest, tuner.model)
    _warn_of_another_base(tuner, config)
    exists = adapter in tuner.roster.configs
    if exists:
        _refuse_merged(tuner, adapter)
    prepared, tensors = _fitted(tuner, adapter, config, per_expert)
    expected = prepared.expected()
    tensors = drop_base_tensors(tensors, expected, tuner.model)
    report, good = checkpoint.compare(expected, tensors, prepared.optional())
    report.check(f"{source} for adapter `{adapter}`", strict, ignore_mismatched_sizes)
    if device is not None:
        good = {key: tensor.to(device) for key, tensor in good.items()}
    if exists:
        _overwrite(tuner, prepared, good, autocast)
    else:
        tuner.commit(prepared, good, autocast, activate=activate)
    return report


def _fitted(
    tuner: Tuner, adapter: str, config: PeftConfig, file: PerExpert
) -> tuple[Prepared, dict[str, Tensor]]:
    """The adapter that a config means, and the file's tensors; embeddings may add to both."""

    def prepared_by(config: PeftConfig) -> Prepared:
        if adapter in tuner.roster.configs:
            return prepare(tuner.model, adapter, config, lenient=True)
        return tuner.prepare(adapter, config, lenient=True)

    prepared = prepared_by(config)
    tensors = file.tensors(prepared.main_sites)
    if tensors.keys() <= prepared.expected().keys():
        return prepared, tensors
    before = config.copy()
    tensors = take_embeddings(config, tensors, tuner.model)
    return prepared if config == before else prepared_by(config), tensors


def _overwrite(
    tuner: Tuner, prepared: Prepared, values: Mapping[str, Tensor], autocast: bool
) -> None:
    """Give an existing adapter the file's tensors *and* the file's config.

    Parameters keep their identity where shapes allow, so that optimisers built on them go on.
    Whether it is active and whether it trains stay as they were.
    """
    roster, adapter = tuner.roster, prepared.adapter
    held = checkpoint.adapter_state(roster, adapter, packed=False)
    current = {key: full_shape(tensor) for key, tensor in held.items()}
    context = roster.context_of(adapter)
    is_other = type(context) is not (prepared.context or type(None))
    is_derived = not prepared.optional() <= values.keys()  # and so from the new config
    is_other = is_other or is_derived or current != prepared.expected()
    if is_other or (context and not context.is_flat):
        flags = {p.requires_grad for p in roster.parameters(adapter)}
        scions = prepared.grow(values, autocast, on_meta=False)
        fresh_context = prepared.grow_context(values, autocast, on_meta=False)
        exchange(roster, adapter, prepared.config, scions, fresh_context)
        roster.set_requires_grad([adapter], True in flags)
        return
    fresh = {(n.site.path, n.method.name, n.site.parameter): m for n, m in prepared.parts}
    pairs = [
        (graft, fresh[graft.site.path, graft.method.name, graft.site.parameter])
        for _, graft in roster.grafts(adapter)
    ]
    write(roster, adapter, values)
    for graft, method in pairs:
        method.site = graft.site
        graft.method = method
    if context is not None:
        context.config = prepared.config
    roster.configs[adapter] = prepared.config


def name_what_was_saved(
    config: PeftConfig, tensors: Mapping[str, Tensor], model: nn.Module
) -> None:
    """Add to `modules_to_save`, by path, what PEFT saved for the end of its name alone.

    There ``classifier`` also means ``pre_classifier``; here a name is a whole path component. The
    file tells: it holds every tensor of such a module.
    """
    saved = getattr(config, "modules_to_save", None)
    if not saved:
        return
    names, spots = tuple(saved), survey(model)
    for spot in spots:
        is_named = f".{spot.path}".endswith(tuple(f".{name}" for name in names))
        if spot.path.endswith(names) and not is_named:
            own = {placed(key, config) for key in _parameters_of(spot, spots)}
            if own and own <= tensors.keys():
                saved.append(spot.path)


def _parameters_of(spot: Spot, spots: Sequence[Spot]) -> set[str]:
    """Paths of the base parameters of a module and of what it holds."""
    inside = [s for s in spots if s is spot or s.path.startswith(f"{spot.path}.")]
    return {
        f"{s.path}.{n}" for s in inside for n, p in s.layer._parameters.items() if p is not None
    }


def _refuse_merged(tuner: Tuner, adapter: str) -> None:
    if adapter in tuner.roster.merged:
        raise StateError(
            f"adapter `{adapter}` is merged into the base; loading over it would leave the base "
            "with what it was. Call unmerge_adapter() first."
        )


def _warn_of_another_base(tuner: Tuner, config: PeftConfig) -> None:
    own = getattr(tuner.model, "name_or_path", None)
    theirs = config.base_model_name_or_path
    if own and theirs and own != theirs and Path(own).name != Path(theirs).name:
        warnings.warn(
            f"the adapter was trained on {shown(theirs)} and is loaded onto `{own}`; shapes may "
            "agree and outputs be meaningless.",
            MultigraftWarning,
            stacklevel=4,
        )


def check_options(options: Mapping[str, Any]) -> None:
    """Fail for options that finding an adapter's files does not have."""
    unknown = sorted(set(options) - {*HUB_OPTIONS, "subfolder", "proxies", "use_safetensors"})
    if unknown:
        raise CheckpointError(
            f"unknown options {unknown}; known are {', '.join((*HUB_OPTIONS, 'subfolder'))}."
        )
