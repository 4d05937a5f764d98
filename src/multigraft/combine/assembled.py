"""A plain LoRA, config and tensors, out of updates that are known site by site.

Nothing is attached: what comes out can be saved, or loaded beside what is there.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from multigraft.combine.config import lora_like, prepared_like
from multigraft.combine.sites import padded, rank_of
from multigraft.combine.svd import Cut
from multigraft.config import PeftConfig
from multigraft.keys import disk_names
from multigraft.methods.lora import LoraConfig
from multigraft.site import Site
from multigraft.tuner import Tuner


def assembled(
    tuner: Tuner,
    source: PeftConfig,
    cuts: Mapping[Site, Cut],
    biases: Mapping[Site, Tensor],
    copies: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """A LoRA of scaling 1 that adds these updates.

    Args:
        source: the config that says what else there is: saved modules, tokens, the base's name.
        cuts: ΔW of each site, its ``times`` divided out.
        biases: Δb of those sites that have one, ``(out,)``.
        copies: tensors beside the updates by key on disk, which stay what they are.
        dtype: of the pairs.

    Returns:
        The config, and tensors by key on disk relative to the base model.
    """
    config: Any = lora_like([source], {site: rank_of(site, cut.a) for site, cut in cuts.items()})
    config.lora_bias, config.use_dora = bool(biases), False
    if config.task_type is None:
        base = type(tuner.model)
        names = {"base_model_class": base.__name__, "parent_library": base.__module__}
        config.auto_mapping = names
    prepared = prepared_like(tuner, free_name(tuner), config, [source], list(cuts))
    known = {(site.path, site.parameter): site for site in cuts}
    state = {}
    for need, method in prepared.parts:
        if need.site.tied is not None:
            continue
        values: Mapping[str, Tensor] = {}
        if not need.method.rides:
            site = known[need.site.path, need.site.parameter]
            values = {n: t.to(dtype) for n, t in _pair(method, cuts[site], biases.get(site))}
        for name, spec in method.tensors().items():
            if spec.saved:
                key = disk_names(need.site, spec.on_disk or name, prepared.config)
                state[key] = copies[key] if need.method.rides else values[name]
    assert isinstance(prepared.config, LoraConfig)
    return prepared.config, state


def _pair(method: Any, cut: Cut, bias: Tensor | None) -> Sequence[tuple[str, Tensor]]:
    values = padded(method, cut)
    if method.bias:
        shape = method.tensors()[method.bias].shape
        values[method.bias] = cut.b.new_zeros(shape) if bias is None else bias
    return list(values.items())


def free_name(tuner: Tuner) -> str:
    """A name that no adapter has."""
    names = (f"plain{n}" for n in itertools.count())
    return next(name for name in names if name not in tuner.roster.configs)
