"""Adapters inside adapters, as files of a nested model have them, made plain where algebra allows.

A low-rank pair (a, b) of scale s on the matrix A of another pair makes the layer A there compute

    A x + s b a x  =  (A + s b a) x          A: (rank, in)   a: (its rank, in)   b: (rank, its rank)

so A' = A + s b a is a plain A of the same rank, and likewise B' = B + s b a; what lies deeper is
folded first. On a whole trained module, W' = W + s b a. Below a wrapper's base layer lies nothing
but the layer, so a pair there acts side by side with those above: it moves up, and where the same
adapter has one there, the two are stacked,

    s B₁ A₁ + s B₂ A₂  =  s [B₁ B₂] [A₁; A₂]          rank: the sum of both
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from multigraft.config import pattern_value
from multigraft.diagnosis.names import HELD, LEAVES, is_group, parsed
from multigraft.errors import UnsupportedError
from multigraft.methods.lora import LoraConfig

PAIR = {"lora_A", "lora_B"}
Rest = tuple[str, ...]
Entries = Mapping[Rest, Tensor]
Leaves = dict[str, Tensor]
Scale = Callable[[str, str, int], float]
"""The scale of (an adapter's name, the path that it is at, its rank)."""


@dataclass
class Plain:
    """What came of a nest.

    Args:
        tensors: by key relative to the base model, for what was nested.
        patterns: ranks and alphas of sites whose rank has changed.
        folded: adapters whose change is in the tensors now; "" for one without a name.
        moved: sites whose pairs lay below a base layer.
        is_empty: whether wrappers were there, and nothing in them.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    patterns: dict[str, tuple[int, float]] = field(default_factory=dict)
    folded: list[str] = field(default_factory=list)
    moved: set[str] = field(default_factory=set)
    is_empty: bool = True


def un_nested(
    tensors: Mapping[str, Tensor], config: LoraConfig, scale: Scale, *, drop: bool = False
) -> Plain:
    """The same function without a nest.

    Args:
        tensors: by their names in the file; those that are nested, and their neighbours.
        config: the adapter's own.
        scale: of the adapters inside it.
        drop: leave out what was nested, rather than fold it in.

    Raises:
        UnsupportedError: no plain adapter is the same function; the message says why.
    """
    plain = Plain()
    groups: dict[tuple[str, str, str], dict[Rest, Tensor]] = {}
    for name, tensor in tensors.items():
        found = parsed(name)
        groups.setdefault((found.site, found.group, found.adapter), {})[found.rest] = tensor
    folding = _Folding(scale, drop, plain)
    levels: dict[str, dict[str, dict[str, Leaves]]] = {}
    for (site, group, adapter), entries in groups.items():
        path = ".".join(part for part in (site, group, adapter) if part)
        level = levels.setdefault(bare(site), {}).setdefault(site, {})
        if group in level:
            raise UnsupportedError(f"{path}: several adapters stand there. Name one: --adapter.")
        level[group] = folding.fold(path, entries)
        if site != bare(site):
            plain.moved.add(bare(site))
    for site, by_level in levels.items():
        _stack(site, list(by_level.values()), config, plain)
    return plain


def scale_of(config: LoraConfig, name: str, path: str, rank: int) -> float:
    """The scale that an adapter's config means at a place of this rank.

    Raises:
        UnsupportedError: it means another rank there, so it is another adapter's.
    """
    meant = pattern_value(config.rank_pattern, path, config.r)
    if meant != rank:
        raise UnsupportedError(
            f"{path}: the adapter {_called(name)} has rank {rank} there, and the config that was "
            f"found for it says {meant}. Name the folder of its own config with --nested."
        )
    alpha: float = pattern_value(config.alpha_pattern, path, config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


@dataclass
class _Folding:
    """One walk over a nest; see `un_nested` for the arguments."""

    scale: Scale
    drop: bool
    plain: Plain

    def fold(self, path: str, entries: Entries) -> Leaves:
        """The weight, and the bias, of the layer at ``path`` with all that is inside it."""
        own = {rest[0] if rest else "weight": t for rest, t in entries.items() if rest in _ENDS}
        held = {r[1:]: t for r, t in entries.items() if r and r[0] in HELD}
        grafts: dict[str, dict[str, dict[Rest, Tensor]]] = {}
        for rest, tensor in entries.items():
            if rest and is_group(rest[0]):
                name, inner = _named(rest[1:])
                grafts.setdefault(name, {}).setdefault(rest[0], {})[inner] = tensor
        if held:
            own |= self.fold(path, held)
        if grafts and "weight" not in own:
            raise UnsupportedError(
                f"{path}: the file holds what was put onto this layer, and not the layer. Un-nest "
                "the checkpoint of the adapter that the layer belongs to: it holds both."
            )
        for name, parts in grafts.items():
            self._add(path, own, name, parts)
        return own

    def _add(self, path: str, own: Leaves, name: str, parts: Mapping[str, Entries]) -> None:
        """Fold one adapter at ``path`` into the layer there."""
        self.plain.is_empty = False
        if self.drop:
            return
        if set(parts) != PAIR:
            raise UnsupportedError(
                f"{path}: the adapter {_called(name)} there holds {', '.join(sorted(parts))}; only "
                "a plain low-rank pair, lora_A and lora_B, can be folded in."
            )
        A, B = (self.fold(f"{path}.{group}", parts[group]) for group in sorted(PAIR))
        a, b, W = A["weight"].double(), B["weight"].double(), own["weight"]
        fits = a.shape[0] == b.shape[1] and len(b) == len(W) and a[0].numel() == W[0].numel()
        if not fits or "bias" in A:
            raise UnsupportedError(
                f"{path}: the pair of {_called(name)} there, {tuple(a.shape)} and "
                f"{tuple(b.shape)}, is no plain pair for a layer of shape {tuple(W.shape)}."
            )
        scale = self.scale(name, path, len(a))
        own["weight"] = _sum(W, scale * (b.flatten(1) @ a.flatten(1)).reshape(W.shape))
        if "bias" in B:
            if "bias" not in own:
                raise UnsupportedError(
                    f"{path}: the adapter {_called(name)} adds a bias there, and the layer has "
                    "none."
                )
            own["bias"] = _sum(own["bias"], scale * B["bias"].double())
        if name not in self.plain.folded:
            self.plain.folded.append(name)


_BARE = ("lora_magnitude_vector", "lora_embedding_A", "lora_embedding_B")
"""Groups that are tensors themselves, and no modules."""
_ENDS: tuple[Rest, ...] = ((), *((leaf,) for leaf in LEAVES))


def _named(rest: Rest) -> tuple[str, Rest]:
    """The adapter's name, where the way goes on with one, and what follows."""
    if rest and rest[0] not in (*LEAVES, *HELD) and not is_group(rest[0]):
        return rest[0], rest[1:]
    return "", rest


def bare(site: str) -> str:
    """The base path behind the wrappers' words at its end."""
    parts = site.split(".")
    while parts and parts[-1] in HELD:
        parts.pop()
    return ".".join(parts)


def _stack(
    site: str, levels: Sequence[dict[str, Leaves]], config: LoraConfig, plain: Plain
) -> None:
    """Put what stood on several levels of one layer side by side."""
    merged = dict(levels[0])
    for level in levels[1:]:
        if set(merged) | set(level) != PAIR:
            raise UnsupportedError(
                f"{site}: what stands there on {len(levels)} levels is more than plain low-rank "
                f"pairs ({', '.join(sorted({*merged, *level}))})."
            )
        merged = {
            "lora_A": _joined(merged["lora_A"], level["lora_A"], 0),
            "lora_B": _joined(merged["lora_B"], level["lora_B"], 1),
        }
    if len(levels) > 1:
        rank = len(merged["lora_A"]["weight"])
        scale = scale_of(config, "", site, len(levels[0]["lora_A"]["weight"]))
        for level in levels[1:]:
            scale_of(config, "", site, len(level["lora_A"]["weight"]))
        plain.is_empty = False
        plain.patterns[site] = rank, scale * (math.sqrt(rank) if config.use_rslora else rank)
    for group, leaves in merged.items():
        for leaf, tensor in leaves.items():
            plain.tensors[_key(site, group, leaf)] = tensor


def _joined(first: Leaves, second: Leaves, axis: int) -> Leaves:
    weight = torch.cat([first["weight"], second["weight"].to(first["weight"].dtype)], axis)
    biases = [leaves["bias"] for leaves in (first, second) if "bias" in leaves]
    return {"weight": weight} | ({"bias": sum(biases[1:], biases[0])} if biases else {})


def _key(site: str, group: str, leaf: str) -> str:
    middle = [] if group in ("modules_to_save", "") else [group]
    end = (
        [] if group in ("lora_magnitude_vector", "lora_embedding_A", "lora_embedding_B") else [leaf]
    )
    return ".".join([site, *middle, *end])


def _sum(tensor: Tensor, change: Tensor) -> Tensor:
    """Exact to rounding: narrow floats, in which a small change would be lost, are widened."""
    dtype: Any = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return (tensor.double() + change).to(dtype)


def _called(name: str) -> str:
    return f"`{name}`" if name else "without a name"
