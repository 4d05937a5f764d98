"""How many ranks each layer gets, and an adapter with exactly these."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from multigraft import checkpoint
from multigraft.calibration.incremental import Directions
from multigraft.calibration.places import Place, places_of
from multigraft.config import matching_pattern
from multigraft.errors import MultigraftWarning, StateError, TargetError, did_you_mean
from multigraft.graft import Graft
from multigraft.keys import disk_names
from multigraft.methods.lora import LoRA, LoraConfig
from multigraft.model import PeftModel
from multigraft.prepare import own_copy, prepare
from multigraft.sites import find, minimal_names
from multigraft.survey import survey
from multigraft.wrap import exchange


@dataclass(eq=False)
class Layer:
    """A layer that is studied.

    Args:
        source: the name of the layer that stands for all with the same input; often itself.
        most: how many ranks it may get.
        converged: which directions stand still, ``(most,)``.
    """

    place: Place
    source: str
    most: int
    directions: Directions = field(default_factory=lambda: Directions(0))
    converged: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))


def distribute(layers: Mapping[str, Layer]) -> dict[str, int]:
    """Ranks by name: as many as the config gives in all, to the directions that explain most."""
    own = [name for name, layer in layers.items() if layer.source == name]
    shared = [name for name, layer in layers.items() if layer.source != name]
    ratios = {n: layers[layers[n].source].directions.ratios for n in (*own, *shared)}
    budget = sum(layer.place.rank for layer in layers.values())
    owners = [name for name, values in ratios.items() for _ in values]
    order = torch.cat([r.cpu() for r in ratios.values()]).argsort(descending=True)
    counts = Counter(owners[i] for i in order[:budget].tolist())
    ranks = {name: counts.get(name, 0) for name in layers}
    # Layers with one input explain the same, so which of them gets the odd rank is chance: the one
    # that is studied, whose directions must stand still, gets the most.
    for name in shared:
        source = layers[name].source
        if ranks[source] < ranks[name]:
            ranks[source], ranks[name] = ranks[name], ranks[source]
    return ranks


def give(model: PeftModel, adapter: str, directions: Mapping[str, Tensor]) -> None:
    """Let an adapter begin at these directions, ``(rank, in)`` by base path, with their ranks.

    Layers that get none are taken out of it; those that are not named stay as they are.

    Raises:
        StateError: the adapter is merged.
        TargetError: a name is no linear layer of the adapter, or its directions do not fit.
    """
    if adapter in model.roster.merged:
        raise StateError(f"adapter `{adapter}` is merged; call unmerge_adapter() first.")
    config = own_copy(model.peft_config[adapter])
    assert isinstance(config, LoraConfig)
    places = {place.path: place for place in places_of(model, config, adapter)}
    _check(places, directions)
    loras = [g for _, g in model.roster.grafts(adapter) if isinstance(g.method, LoRA)]
    left = [g.site.path for g in loras if g.site.path not in directions]
    if left:
        warnings.warn(
            f"EVA: there are no directions for {', '.join(left[:3])}; they begin as plain LoRA.",
            MultigraftWarning,
            stacklevel=4,
        )
    ranks, alphas = _at_targets(loras, directions, config.eva_config.adjust_scaling_factors)
    _set_patterns(config, ranks, alphas)
    _leave_out(config, model.get_base_model(), [p for p, V in directions.items() if not len(V)])
    state = checkpoint.adapter_state(model.roster, adapter, packed=False)
    values = {key: tensor for key, tensor in state.items() if not tensor.is_meta}
    for graft in loras:
        V = directions.get(graft.site.path)
        if V is not None:
            key_a, key_b = (
                disk_names(graft.site, n, config) for n in graft.method.geometry.factors
            )
            values[key_a] = V.to(graft.site.device, state[key_a].dtype).contiguous()
            values[key_b] = values[key_a].new_zeros(state[key_b].shape[0], len(V))
    _exchange(model, adapter, config, values)


def _check(places: Mapping[str, Place], directions: Mapping[str, Tensor]) -> None:
    for path, V in directions.items():
        if path not in places:
            raise TargetError(
                f"EVA: `{path}` is no linear layer of the adapter.{did_you_mean(path, places)}"
            )
        in_, _ = places[path].sizes
        if V.dim() != 2 or V.shape[1] != in_:
            raise TargetError(
                f"EVA: directions {tuple(V.shape)} of `{path}` must be (rank, {in_}), as "
                "get_eva_state_dict() gives them for this model."
            )
    if not any(len(V) for V in directions.values()):
        raise TargetError("EVA: no layer gets a rank; there must be directions for at least one.")


def _at_targets(
    loras: Sequence[Graft], directions: Mapping[str, Tensor], adjusts: bool
) -> tuple[dict[str, int], dict[str, float]]:
    """Rank and alpha of every site that stays, by what patterns are matched with."""
    ranks, alphas = {}, {}
    for graft in loras:
        lora, V = graft.method, directions.get(graft.site.path)
        rank = lora.rank if V is None else len(V)
        if rank:
            ranks[graft.site.target] = rank
            alphas[graft.site.target] = lora.alpha * rank / lora.rank if adjusts else lora.alpha
    return ranks, alphas


def _set_patterns(
    config: LoraConfig, ranks: Mapping[str, int], alphas: Mapping[str, float]
) -> None:
    """Name what is not the config's own rank and alpha, each by a key that means it alone."""
    known = list(ranks)
    config.rank_pattern = {_key(t, known): r for t, r in ranks.items() if r != config.r}
    config.alpha_pattern = {_key(t, known): a for t, a in alphas.items() if a != config.lora_alpha}


def _key(target: str, known: Sequence[str]) -> str:
    is_suffix = any(matching_pattern({target: 0}, other) for other in known if other != target)
    return f"^{re.escape(target)}" if is_suffix else target


def _leave_out(config: LoraConfig, base: nn.Module, paths: Sequence[str]) -> None:
    """Take layers out of the config's targets."""
    if not paths:
        return
    spots = survey(base)
    needs = find(base, config, spots, lenient=True)
    chosen = [
        need.spot
        for need in needs
        if need.method is LoRA and need.site.parameter is None and need.site.path not in paths
    ]
    config.target_modules = minimal_names(chosen, spots)


def _exchange(
    model: PeftModel, adapter: str, config: LoraConfig, values: Mapping[str, Tensor]
) -> None:
    """Set the adapter anew by this config; active and trainable stay as they were."""
    roster = model.roster
    dtype = next(t.dtype for t in values.values() if t.is_floating_point())
    flags = {p.requires_grad for p in roster.parameters(adapter)}
    prepared = prepare(model.get_base_model(), adapter, config, lenient=True)
    scions = prepared.grow(values, dtype == torch.float32, on_meta=False)
    exchange(roster, adapter, prepared.config, scions)
    roster.set_requires_grad([adapter], True in flags)
