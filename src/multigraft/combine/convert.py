"""Any adapter that changes weights as a plain LoRA, the nearest of its rank.

    ΔW = U S Vᵀ        B = U S, A = Vᵀ, cut to the rank

ΔW is what merging would add; where a method scales or turns a layer's output, its bias changes as
well, and goes into `lora_bias`. Where the update is a low-rank pair already, its factors are
decomposed and ΔW is never made.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from multigraft import checkpoint
from multigraft.combine import svd
from multigraft.combine.assembled import assembled
from multigraft.combine.contract import Options
from multigraft.combine.ranks import Rank, check_rank
from multigraft.combine.sites import rank_each
from multigraft.combine.svd import Cut
from multigraft.effective import changes_bias, in_dtype, mapped
from multigraft.errors import ConfigError, MultigraftWarning, UnsupportedError
from multigraft.graft import Graft
from multigraft.keys import full_key
from multigraft.merge import check_values
from multigraft.methods.lora import LoraConfig
from multigraft.progress import shown
from multigraft.roster import Roster
from multigraft.site import Site
from multigraft.state import roster_of_model
from multigraft.tuner import Tuner

WHERE = "convert_to_lora"
Decompose = Callable[[Tensor, Rank, Options], Cut]


def convert_to_lora(
    model: nn.Module,
    rank: Rank,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The config and tensors of a LoRA that is nearest to an adapter of any method.

    What the adapter has besides (saved modules, biases, tokens) comes along unchanged, and the
    model stays as it is.

    Args:
        model: with the adapter, attached by either `get_peft_model` or `inject_adapter_in_model`.
        rank: of each layer; or a float: the share of the energy, the sum of squared singular
            values, that is kept at each layer.
        progressbar: show one.
        compile_kwargs: options of `torch.compile` for the decomposition.

    Returns:
        The config, of scaling 1, and tensors by their names in PEFT's files.

    Raises:
        AdapterNameError: there is no such adapter.
        ConfigError: the rank is out of range, or larger than a layer.
        UnsupportedError: the adapter's effect is no change of weights.
    """
    check_rank(WHERE, "rank", rank)
    roster, prefix = roster_of_model(model)
    decompose = svd.of_matrix
    if compile_kwargs is not None:
        decompose = torch.compile(svd.of_matrix, **compile_kwargs)
    config, state = _converted(roster, adapter_name, rank, progressbar, decompose)
    return config, {full_key(key) if prefix else key: value for key, value in state.items()}


def save_as_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    rank: Rank,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Write what `convert_to_lora` gives into a directory, in PEFT's format, all or nothing."""
    config, state = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    root = Path(path)
    checkpoint.save(root, {root: (config, state)})


@torch.no_grad()
def _converted(
    roster: Roster, adapter: str, rank: Rank, progressbar: bool, decompose: Decompose
) -> tuple[LoraConfig, dict[str, Tensor]]:
    config = roster.configs[roster.require_one(adapter)]
    grafts = [graft for _, graft in roster.grafts(adapter) if graft.tied is None]
    for graft in grafts:
        _check(graft, adapter)
    main = [graft for graft in grafts if not graft.method.rides]
    if not main:
        raise UnsupportedError(
            f"{WHERE}: `{adapter}` is a {config.peft_type}, which changes no weight. It has no "
            "LoRA."
        )
    if str(config.peft_type) == "LORA":
        warnings.warn(
            f"{WHERE}: `{adapter}` is a LoRA already. compress_adapter() gives it another rank.",
            MultigraftWarning,
            stacklevel=4,
        )
    cuts: dict[Site, Cut] = {}
    biases: dict[Site, Tensor] = {}
    for graft in shown(main, "Converting to LoRA", progressbar):
        cuts[graft.site] = _cut(graft, rank, decompose)
        bias = _bias_change(graft)
        if bias is not None:
            biases[graft.site] = bias / graft.site.times
    held = checkpoint.adapter_state(roster, adapter)
    dtype = next(t.dtype for t in main[0].params.values() if t.is_floating_point())
    return assembled(Tuner(roster.root), config, cuts, biases, held, dtype)


def is_convertible(roster: Roster, adapter: str) -> bool:
    """Whether the adapter's effect is a change of weights.

    Raises:
        AdapterNameError: there is no such adapter.
    """
    grafts = [graft for _, graft in roster.grafts(roster.require_one(adapter))]
    return any(not g.method.rides for g in grafts) and all(map(_changes_weights, grafts))


def _changes_weights(graft: Graft) -> bool:
    method = graft.method
    is_change = method.kind in ("additive", "map") and graft.site.geometry is not None
    return method.rides or (is_change and method.mergeable)


def _check(graft: Graft, adapter: str) -> None:
    method, site = graft.method, graft.site
    if not _changes_weights(graft):
        raise UnsupportedError(
            f"{WHERE}: `{adapter}` is a {method.name} at {site}, whose effect is no change of a "
            "layer's weight. Keep it as it is."
        )
    check_values(graft, str(site), "converting it", "converted")


def _cut(graft: Graft, rank: Rank, decompose: Decompose) -> Cut:
    """ΔW of a site as a pair."""
    site, method = graft.site, graft.method
    layer, geometry = site.layer, method.geometry
    if isinstance(rank, int) and rank > min(geometry.sizes(layer)):
        raise ConfigError(
            f"{WHERE}: `rank` (={rank}) must be at most {min(geometry.sizes(layer))}, the smaller "
            f"side of {site}. Choose a lower one, or a share of the energy."
        )
    params = in_dtype(_wide(graft), graft.params)
    factors = method.low_rank(params)
    if factors is not None:
        A, B, scale = factors
        a, b = geometry.pairs(layer, A, B)
        return svd.of_factors(a * (scale / site.times), b, rank_each(site, len(a), rank), Options())
    M = geometry.as_matrices(layer, _weight_change(graft) / site.times)
    return decompose(M, rank_each(site, len(M), rank), Options())


def _weight_change(graft: Graft) -> Tensor:
    """ΔW in the weight's layout, in at least float32."""
    site, method, dtype = graft.site, graft.method, _wide(graft)
    params = in_dtype(dtype, graft.params)
    if method.kind == "additive":
        return method.delta(params, site.weight().to(dtype) if method.needs_weight else None)
    W = site.weight().to(dtype)
    return mapped([graft], site.key, W) - W


def _bias_change(graft: Graft) -> Tensor | None:
    """Δb, ``(out,)``, or None."""
    site, method, dtype = graft.site, graft.method, _wide(graft)
    if method.kind == "additive":
        return method.delta_bias(in_dtype(dtype, graft.params))
    if not changes_bias(graft):
        return None
    key = site.key_of("bias")
    if key in site.kept:  # something is merged
        b = site.storage.read_kept(site.layer, site.kept[key], "bias")
    else:
        b = site.storage.read(site.layer, "bias")
    return mapped([graft], key, b.to(dtype)) - b.to(dtype)


def _wide(graft: Graft) -> torch.dtype:
    dtypes = [t.dtype for t in graft.params.values() if t.is_floating_point()]
    dtype = torch.float32
    for each in dtypes:
        dtype = torch.promote_types(dtype, each)
    return dtype
