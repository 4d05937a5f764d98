"""Adapters saved for experts that were modules of their own, on models whose experts are fused.

    W = [W1; W3]        ΔW = [B1, 0; 0, B3] [A1; A3]        expert by expert, then stacked

transformers 4 had a linear layer for each projection of each expert, and files of that time have a
pair for each. transformers 5 stacks them: one `gate_up_proj` and one `down_proj` a layer. The
update of a stack is exactly that of its parts: ranks add up, and where scales differ B carries it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from multigraft.bases import parameter_geometry
from multigraft.config import PeftConfig, pattern_value
from multigraft.errors import CheckpointError
from multigraft.methods.lora import LoraConfig
from multigraft.site import Site
from multigraft.survey import Spot, survey

STACKED = {
    "gate_up_proj": (("w1", "gate_proj"), ("w3", "up_proj")),
    "down_proj": (("w2", "down_proj"),),
}
"""Stacked parameters to the names that each part of their rows had."""
PLACES = {
    part: (name, place)
    for name, parts in STACKED.items()
    for place, names in enumerate(parts)
    for part in names
}
KEY = re.compile(r"(.+)\.experts\.(\d+)\.(\w+)\.(lora_\w+?)(?:\.(?:weight|bias))?")
REST = re.compile(r"(.+)(\.lora_\w+(?:\.\w+)?)")


@dataclass
class Stack:
    """What a file has for one stacked parameter: (expert, part) to its old path and tensors."""

    layer: nn.Module
    name: str
    pairs: dict[tuple[int, int], tuple[str, dict[str, Tensor]]] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The largest sum of the ranks of one expert's parts."""
        sums: dict[int, int] = {}
        for (expert, _), (_, pair) in self.pairs.items():
            sums[expert] = sums.get(expert, 0) + len(pair["lora_A"])
        return max(sums.values())

    def factors(self, config: LoraConfig) -> tuple[Tensor, Tensor, float]:
        """A and B as the fused parameter takes them, and the scale of both.

        Args:
            config: the file's own.

        Raises:
            CheckpointError: a tensor does not fit the parameter.
        """
        geometry = parameter_geometry(self.layer, self.name)
        experts = len(cast(Tensor, self.layer._parameters[self.name]))
        if geometry is None or geometry.name != "experts":
            raise CheckpointError(f"`{self.name}` is no stack of experts on this model.")
        in_, out = geometry.sizes(self.layer)
        out //= len(STACKED[self.name])
        like = next(iter(self.pairs.values()))[1]["lora_A"]
        a = like.new_zeros(experts, self.rank, in_)
        b = like.new_zeros(experts, out * len(STACKED[self.name]), self.rank)
        scale = _scale(next(iter(self.pairs.values()))[0], config)
        filled = [0] * experts
        for (expert, part), (path, pair) in sorted(self.pairs.items()):
            A, B = pair["lora_A"], pair["lora_B"]
            rank = len(A)
            if expert >= experts or A.shape != (rank, in_) or B.shape != (out, rank):
                raise CheckpointError(
                    f"{path}: A {tuple(A.shape)} and B {tuple(B.shape)} do not fit this model, "
                    f"which has {experts} experts of {out} by {in_} there."
                )
            columns = slice(filled[expert], filled[expert] + rank)
            a[expert, columns] = A
            b[expert, part * out : (part + 1) * out, columns] = B * (_scale(path, config) / scale)
            filled[expert] += rank
        A, B = geometry.from_pairs(self.layer, a, b)
        return A.contiguous(), B.contiguous(), scale


class PerExpert:
    """A file's tensors, those of single experts gathered by the parameter that holds them now.

    Args:
        tensors: the file's, by key relative to the base model.
    """

    def __init__(self, model: nn.Module, config: PeftConfig, tensors: Mapping[str, Tensor]) -> None:
        self.stacks: dict[str, Stack] = {}
        self.rest = dict(tensors)
        matches = {key: match for key in tensors if (match := KEY.fullmatch(key))}
        if not matches or not isinstance(config, LoraConfig):
            return
        self.spots = {path: spot for spot in survey(model) for path in spot.paths}
        blocks = {match[1]: self._block(match[1]) for match in matches.values()}
        for key, match in matches.items():
            path, spot = blocks[match[1]]
            if spot is not None and f"{match[1]}.experts.{match[2]}.{match[3]}" not in self.spots:
                self._put(f"{path}.experts", spot, match, self.rest.pop(key))
        if self.stacks:
            self.rest = {_moved(key, blocks): tensor for key, tensor in self.rest.items()}
            self._rewrite(config)

    def tensors(self, sites: Iterable[Site]) -> dict[str, Tensor]:
        """All of the file's tensors, by the keys that these sites have."""
        found = dict(self.rest)
        for site in sites:
            made = self.made.get(site.target) if self.stacks and site.parameter else None
            if made is not None:
                found[f"{site.disk}.lora_A.weight"] = made[0]
                found[f"{site.disk}.lora_B.weight"] = made[1]
        return found

    def _put(self, path: str, spot: Spot, match: re.Match[str], tensor: Tensor) -> None:
        _, expert, part, leaf = match.groups()
        name, place = PLACES.get(part, ("", 0))
        is_pair = leaf in ("lora_A", "lora_B") and tensor.dim() == 2
        if not is_pair or match[0].endswith(".bias") or not name:
            raise CheckpointError(
                f"{match[0]}: this model's experts are stacked, and only plain pairs of the "
                f"projections {', '.join(sorted(PLACES))} can be. Load it with the version of "
                "transformers that it was trained with."
            )
        stack = self.stacks.setdefault(f"{path}.{name}", Stack(spot.layer, name))
        old = match[0].rpartition(".lora_")[0]
        stack.pairs.setdefault((int(expert), place), (old, {}))[1][leaf] = tensor

    def _block(self, block: str) -> tuple[str, Spot | None]:
        """Where a block that held experts is now: there, or in the same layer by another name."""
        layer = block.rpartition(".")[0]
        near = re.compile(rf"({re.escape(layer)}\.\w+)\.experts")
        for path in (f"{block}.experts", *(p for p in self.spots if near.fullmatch(p))):
            spot = self.spots.get(path)
            if spot is not None and STACKED.keys() & spot.layer._parameters.keys():
                return path.removesuffix(".experts"), spot
        return block, None

    def _rewrite(self, config: LoraConfig) -> None:
        """Let the config name what the file's tensors are for on this model, and nothing else."""
        for stack in self.stacks.values():
            for path, pair in stack.pairs.values():
                if len(pair) < 2:
                    raise CheckpointError(f"{path}: the file has one of lora_A, lora_B alone.")
        self.made = {path: stack.factors(config) for path, stack in self.stacks.items()}
        sites = {match[1]: None for key in self.rest if (match := REST.fullmatch(key))}
        routers = [path for path in sites if self._is_router(path)]
        config.target_modules = sorted(sites.keys() - set(routers))
        named = [*(config.target_parameters or []), *(f"{path}.weight" for path in routers)]
        config.target_parameters = [*dict.fromkeys([*named, *self.stacks])]
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        ranks: dict[str, int] = {}
        alphas: dict[str, float] = {}
        for path, (_, _, scale) in self.made.items():
            rank = ranks[re.escape(path)] = self.stacks[path].rank
            alphas[re.escape(path)] = scale * (math.sqrt(rank) if config.use_rslora else rank)
        config.rank_pattern = ranks | _still_meant(config.rank_pattern, sites)
        config.alpha_pattern = alphas | _still_meant(config.alpha_pattern, sites)

    def _is_router(self, path: str) -> bool:
        """Whether it was a linear layer and is now a module that reads a weight of its own."""
        spot = self.spots.get(path)
        weight = spot.layer._parameters.get("weight") if spot is not None else None
        return weight is not None and weight.dim() == 2 and not isinstance(spot.layer, nn.Linear)  # type: ignore[union-attr]


def _moved(key: str, blocks: Mapping[str, tuple[str, Spot | None]]) -> str:
    """A key whose block has another name on this model, under that name."""
    for old, (new, _) in blocks.items():
        if key.startswith(f"{old}."):
            return new + key.removeprefix(old)
    return key


def _still_meant(patterns: Mapping[str, Any], sites: Iterable[str]) -> dict[str, Any]:
    """Without the patterns that were of single experts alone."""
    paths = list(sites)
    return {k: v for k, v in patterns.items() if any(re.match(rf"(.*\.)?({k})$", p) for p in paths)}


def _scale(path: str, config: LoraConfig) -> float:
    rank = pattern_value(config.rank_pattern, path, config.r)
    alpha = pattern_value(config.alpha_pattern, path, config.lora_alpha)
    return float(alpha / (math.sqrt(rank) if config.use_rslora else rank))
