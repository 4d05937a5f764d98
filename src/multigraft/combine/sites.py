"""What the tensors of a combined adapter are at one site, from those of its sources there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multigraft.combine import svd
from multigraft.combine.cat import Pair, side_by_side
from multigraft.combine.contract import Options, Rule
from multigraft.combine.ranks import Rank
from multigraft.combine.svd import Cut
from multigraft.graft import Graft
from multigraft.methods import Method
from multigraft.methods.contract import Params
from multigraft.site import Site


@dataclass(frozen=True)
class Part:
    """One source at one site, with the weight that the caller gives it."""

    graft: Graft
    weight: float


def pair_at(
    method: Any, cut: Cut, parts: Sequence[Part], rule: Rule, options: Options
) -> dict[str, Tensor]:
    """The tensors of the combined LoRA at its site, by name in memory.

    Args:
        method: the new LoRA there, whose rank is given.
        cut: its pair, of scaling 1; see `combined`.
        parts: the sources that act there; other sources add nothing.
    """
    params = padded(method, cut)
    if method.bias:
        params[method.bias] = _output_bias(method, parts, rule, options)
    if method.variant is not None:
        params |= _variant_tensors(method, parts, rule, options)
    return params


def padded(method: Any, cut: Cut) -> dict[str, Tensor]:
    """A and B of the method's rank: this pair, and zeros where it has fewer ranks, as in PEFT."""
    layer, geometry = method.site.layer, method.geometry
    rows = geometry.factor_shapes(layer, method.rank)[0][0] // len(cut.a)
    a = F.pad(cut.a, (0, 0, 0, rows - cut.a.shape[1]))
    b = F.pad(cut.b, (0, rows - cut.b.shape[2]))
    A, B = geometry.from_pairs(layer, a, b)
    return {method.A: A.contiguous(), method.B: B.contiguous()}


def copies_at(
    method: Method, parts: Sequence[Part], rule: Rule, options: Options
) -> dict[str, Tensor]:
    """Copies of base tensors (saved modules, biases, tokens): the changes of the base combined.

        T = T_base + rule(T_1 - T_base, T_2 - T_base, …)

    What is counted rather than trained (integers) is the first source's.
    """
    base = _base_values(method)
    return {
        name: _changed(base[name], [(p.graft.params[name], p.weight) for p in parts], rule, options)
        for name in method.tensors()
    }


def combined(parts: Sequence[Part], rule: Rule, rank: Rank, options: Options) -> Cut:
    """The pair of the rule at one site, in the geometry's independent pairs, of scaling 1.

    Args:
        rank: of the site, for rules that truncate.
    """
    site, geometry = parts[0].graft.site, parts[0].graft.method.geometry
    layer = site.layer
    dtype = _wide(t for p in parts for t in p.graft.params.values())
    found = [own_pair(p.graft) for p in parts]
    factors = [(A.to(site.device, dtype), B.to(site.device, dtype)) for A, B, _ in found]
    scales = [scale / site.times for _, _, scale in found]
    weights = [p.weight for p in parts]
    total = [w * s for w, s in zip(weights, scales, strict=True)]
    if rule.on == "factors":
        roots = [math.sqrt(abs(c)) for c in total]
        signed = [math.copysign(r, c) for r, c in zip(roots, total, strict=True)]
        A = rule.merge([A for A, _ in factors], signed, options)
        B = rule.merge([B for _, B in factors], roots, options)
        return Cut(*geometry.pairs(layer, A, B), 0.0)
    if rule.on == "delta":
        deltas = [geometry.product(layer, *f) * s for f, s in zip(factors, scales, strict=True)]
        M = geometry.as_matrices(layer, rule.merge(deltas, weights, options))
        return svd.of_matrix(M, rank_each(site, len(M), rank), options)
    a, b = side_by_side([geometry.pairs(layer, *f) for f in factors], total)
    if rule.truncates:
        return svd.of_factors(a, b, rank_each(site, len(a), rank), options)
    return Cut(a, b, 0.0)


def rank_each(site: Site, pairs: int, rank: Rank) -> Rank:
    """The rank of each of a site's independent pairs, when the site's is this."""
    if isinstance(rank, float):
        return rank
    assert site.geometry is not None
    return site.geometry.factor_shapes(site.layer, rank)[0][0] // pairs


def rank_of(site: Site, a: Tensor) -> int:
    """The rank of a site whose independent pairs have these factors, ``(n, rank, in)``."""
    assert site.geometry is not None
    pairs, each, _ = a.shape
    return each * pairs**2 // site.geometry.factor_shapes(site.layer, pairs)[0][0]


def width(graft: Graft) -> int:
    """The rank of what a LoRA does at its site: more than its own where it began elsewhere."""
    A, B, _ = own_pair(graft)
    a, _ = graft.method.geometry.pairs(graft.site.layer, A, B)
    return rank_of(graft.site, a)


def own_pair(graft: Graft) -> tuple[Tensor, Tensor, float]:
    """A LoRA's pair as it adds it, whatever a variant does with it, and its scaling."""
    method: Any = graft.method
    params = {name: method.packed(name, tensor) for name, tensor in graft.params.items()}
    found: tuple[Tensor, Tensor, float] | None = method.low_rank(params)
    return found or (*method.factors(params), method.scaling)


def _output_bias(method: Any, parts: Sequence[Part], rule: Rule, options: Options) -> Tensor:
    """B's bias, which is scaled like B: relative to zero, its base value."""
    own = [
        (p.graft.params[method.bias] * (p.graft.method.scaling / method.scaling), p.weight)
        for p in parts
        if method.bias in p.graft.params
    ]
    site = method.site
    zero = torch.zeros(method.tensors()[method.bias].shape, dtype=site.dtype, device=site.device)
    return _changed(zero, own, rule, options)


def _variant_tensors(
    method: Any, parts: Sequence[Part], rule: Rule, options: Options
) -> dict[str, Tensor]:
    """The variant's own tensors, such as DoRA's magnitude, relative to those of no update.

    A source without the variant has those with which the variant acts as its plain pair does.
    """
    A, B, _ = own_pair(parts[0].graft)
    still = _with_variant(method, (torch.zeros_like(A), torch.zeros_like(B)), 1.0)
    own = [_own_or_made(method, part.graft) for part in parts]
    return {
        name: _changed(
            value, [(t[name], p.weight) for t, p in zip(own, parts, strict=True)], rule, options
        )
        for name, value in still.items()
    }


def _own_or_made(method: Any, graft: Graft) -> Params:
    """A source's tensors of the variant, or those with which it would act as its plain pair."""
    lora: Any = graft.method
    if lora.variant is not None and lora.variant.name == method.variant.name:
        return graft.params
    A, B, scaling = own_pair(graft)
    return _with_variant(method, (A, B), scaling)


def _with_variant(method: Any, pair: Pair, scaling: float) -> dict[str, Tensor]:
    """The tensors of ``method``'s variant for a plain pair of this scaling."""
    lora = type(method)(method.site, method.config)
    lora.scaling = scaling
    dtype, device = _wide(pair), method.site.device
    fresh = {
        name: torch.empty(spec.shape, dtype=dtype, device=device)
        for name, spec in lora.variant.tensors(lora).items()
    }
    lora.variant.reset(lora, {lora.A: pair[0], lora.B: pair[1], **fresh})
    return fresh


def _base_values(method: Method) -> Params:
    """What the copies of a method hold before training: the base's own values."""
    if method.kind == "replace":
        return method.module().state_dict()
    site = method.site
    params = {
        name: torch.empty(spec.shape, dtype=site.dtype, device=site.device)
        for name, spec in method.tensors().items()
    }
    method.reset(params)
    return params


def _changed(
    base: Tensor, own: Sequence[tuple[Tensor, float]], rule: Rule, options: Options
) -> Tensor:
    """``base`` plus the combined changes of it; the very tensor where there is nothing to do."""
    if not own:
        return base
    values, weights = zip(*own, strict=True)
    is_whole = rule.sparsify is None or options.density == 1
    if not base.is_floating_point() or (len(own) == 1 and weights[0] == 1 and is_whole):
        return values[0].clone()
    dtype = _wide((base, *values))
    wide = base.to(dtype)
    return wide + rule.merge([v.to(wide) - wide for v in values], weights, options)


def _wide(tensors: Any) -> torch.dtype:
    """The dtype to compute in: the widest among these, and at least float32."""
    return reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)
