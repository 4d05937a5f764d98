"""Adapters on disk into one more on disk: the base is read only where the result depends on it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from multigraft import checkpoint
from multigraft.combine import ia3
from multigraft.combine.config import FILTERS
from multigraft.combine.contract import Options
from multigraft.combine.ranks import Rank
from multigraft.combine.request import Request
from multigraft.combine.shell import is_as_named, reasons_for_base, shell_of, tensors_of
from multigraft.combine.weighted import add_weighted
from multigraft.config import CONFIG_NAME
from multigraft.containers import check_name
from multigraft.errors import AdapterNameError, CheckpointError, MultigraftWarning, StateError
from multigraft.inspection import AdapterFiles, read_adapters
from multigraft.loading import load_into
from multigraft.saving import files_of
from multigraft.tuner import Tuner

Pathlike = str | os.PathLike[str]
NEW = "combined"


@dataclass(frozen=True)
class Combined:
    """What was made.

    Args:
        folder: of the new adapter.
        adapters, weights: of what.
        method: how.
        sites: at how many layers it acts.
        ranks: its smallest and largest rank; None where it has none.
        error: the largest share of a layer's sum that was lost by cutting to a rank; None where
            nothing says.
        base: the base whose weights were needed; None where the files were enough.
    """

    folder: str
    adapters: list[str]
    weights: list[float]
    method: str
    sites: int
    ranks: tuple[int, int] | None
    error: float | None
    base: str | None

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self)


def combine_files(
    adapters: Sequence[Pathlike],
    output: Pathlike,
    *,
    weights: Sequence[float] | None = None,
    method: str = "svd",
    rank: Rank | None = None,
    density: float | None = None,
    majority: str = "total",
    clamp: float | None = None,
    seed: int = 0,
    base: Pathlike | None = None,
    overwrite: bool = False,
    allow_pickle: bool = False,
) -> Combined:
    """The weighted combination that `add_weighted_adapter` makes, from files to files.

    Of the base nothing is needed where the adapters are low-rank pairs or IA3's vectors alone.
    Where they are more (DoRA, saved modules, biases, tokens, experts, convolutions), what they
    change of the base is combined, and its weights are read where they lie, layer by layer.

    Args:
        weights: one for each adapter; equal shares by default.
        method, rank, density, majority, clamp: as for `add_weighted_adapter`.
        seed: of what DARE leaves out.
        base: a directory, or an id on the hub.
        overwrite: replace an adapter that is there.

    Raises:
        CheckpointError: the base is needed and not given, or files are damaged or do not fit.
        ConfigError, UnsupportedError, TargetError: what is asked for cannot be had, and why.
        StateError: there is an adapter at the output.
    """
    target = Path(output).expanduser()
    if (target / CONFIG_NAME).exists() and not overwrite:
        raise StateError(f"{target} holds an adapter. Choose another --output, or --overwrite it.")
    found = _named(read_adapters([os.fspath(a) for a in adapters], allow_pickle=allow_pickle))
    shares = [1 / len(found)] * len(found) if weights is None else [float(w) for w in weights]
    _warn_of_other_bases(found)
    reasons = {files.name: reasons_for_base(files) for files in found}
    source = None if base is None else os.fspath(base)
    if source is None:
        _require_no_base(reasons, found)
    needs_base = any(reasons.values())
    model = _mapped(source) if source is not None and needs_base else shell_of(found)
    tuner = Tuner(model)
    in_float32 = any(tensor.dtype == torch.float32 for tensor in tensors_of(found))
    for files in found:
        load_into(
            tuner,
            files.folder,
            files.name,
            autocast=in_float32,
            config=files.config,
            allow_pickle=files.is_pickle,
        )
    names = [files.name for files in found]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = Options(density, majority, clamp)
        ranks, error = _add(tuner, names, shares, method, rank, options)
    _save(tuner, target, found, is_shell=not needs_base or source is None)
    layers = tuner.roster.layers[NEW]
    used = source if needs_base else None
    return Combined(str(target), names, shares, method, len(layers), ranks, error, used)


def _add(
    tuner: Tuner,
    names: list[str],
    weights: list[float],
    method: str,
    rank: Rank | None,
    options: Options,
) -> tuple[tuple[int, int] | None, float | None]:
    """Make the combination on the model; its ranks, and the largest error."""
    if ia3.are_all(tuner, names):
        ia3.add_weighted(tuner, names, weights, NEW, method)
        return None, None
    request = Request.of(names, weights, method, rank, options)
    residuals = add_weighted(tuner, request, NEW)
    ranks = [residual.rank for residual in residuals]
    is_cut = request.rule.truncates
    error = max((r.error for r in residuals), default=0.0) if is_cut else None
    return (min(ranks), max(ranks)) if ranks else None, error


def _save(tuner: Tuner, target: Path, found: Sequence[AdapterFiles], *, is_shell: bool) -> None:
    config, state = files_of(tuner.roster, NEW, tuner.model)
    sources: list[Any] = [files.config for files in found]
    saved: Any = config
    saved.auto_mapping = sources[0].auto_mapping
    saved.base_model_name_or_path = sources[0].base_model_name_or_path
    if is_shell:
        if hasattr(saved, "fan_in_fan_out"):
            saved.fan_in_fan_out = sources[0].fan_in_fan_out
        if not is_as_named(saved, sources, FILTERS):
            paths = {graft.site.path for _, graft in tuner.roster.grafts(NEW)}
            saved.target_modules = sorted(paths)
            for name, neutral in FILTERS.items():
                setattr(saved, name, neutral)
    checkpoint.save(target, {target: (config, state)})


def _mapped(source: str) -> nn.Module:
    """The base with its weights where they lie."""
    from multigraft.merging.base import local_folder, open_base

    model = open_base(local_folder(source)).model
    # A plain module to the type checker: transformers is seen as Any.
    model.name_or_path = source  # type: ignore[assignment]
    return model


def _require_no_base(reasons: dict[str, list[str]], found: Sequence[AdapterFiles]) -> None:
    for files in found:
        if reasons[files.name]:
            named = files.config.base_model_name_or_path
            raise CheckpointError(
                f"`{files.name}` cannot be combined without its base: {reasons[files.name][0]}. "
                f"Give it with --base{f' {named}' if named else ''}; its weights are not loaded "
                "into memory."
            )


def _warn_of_other_bases(found: Sequence[AdapterFiles]) -> None:
    bases = {files.config.base_model_name_or_path for files in found} - {None, ""}
    if len({Path(str(base)).name for base in bases}) > 1:
        warnings.warn(
            f"the adapters were trained on different bases ({', '.join(sorted(map(str, bases)))}); "
            "shapes may agree and outputs be meaningless.",
            MultigraftWarning,
            stacklevel=3,
        )


def _named(found: Sequence[AdapterFiles]) -> list[AdapterFiles]:
    """The adapters under names that a model can hold."""
    named = []
    for number, files in enumerate(found, start=1):
        try:
            check_name(files.name)
            name = files.name if files.name != NEW else f"{NEW}-{number}"
        except AdapterNameError:
            name = f"adapter-{number}"
        named.append(replace(files, name=name))
    return named
