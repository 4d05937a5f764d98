"""Base layer and low-rank adapters in one node, where a layer and its adapters allow it.

Everything else runs part by part in `AdaptedLayer.run`, with the same result to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from multigraft import draws, kernels
from multigraft.bank import frozen_of, joined, pair, rate
from multigraft.graft import Graft
from multigraft.kernels import AnyPart, Dropped, Part, Reweighted, Seeded, masked_input


def fused(grafts: Sequence[Graft], x: Tensor, training: bool) -> Tensor | None:
    """The base layer's output plus what these adapters add, or None where parts must run alone.

    Args:
        grafts: at least one, all of one site.
        x: the base layer's input, ``(..., in)``.
    """
    part = part_of(grafts, x, training)
    return None if part is None else run([part], x, rate(grafts, training))[0]


def run(parts: Sequence[AnyPart], x: Tensor, p: float) -> list[Tensor]:
    """The outputs of layers that are parts of one kind.

    Args:
        p: the dropout of what their factors see.
    """
    pairs = [part for part in parts if isinstance(part, Part)]
    if pairs:
        return kernels.adapted_linears(x, pairs, dropped(x, p, pairs) if p else None)
    return kernels.reweighted_linears(x, [part for part in parts if isinstance(part, Reweighted)])


def part_of(grafts: Sequence[Graft], x: Tensor, training: bool) -> AnyPart | None:
    """The base layer and these adapters as part of one node, if they are that."""
    frozen = frozen_of(grafts[0].site, x)
    if frozen is None:
        return None
    if len(grafts) == 1:
        found = pair(grafts[0], training, dropout=True)
    else:
        found = joined(grafts, training)
    if found is not None:
        return Part(*frozen, (found[0],), (found[1],), (found[2],))
    if len(grafts) > 1:
        return None
    return grafts[0].method.part(grafts[0].params, *frozen, training)


def dropped(x: Tensor, p: float, parts: Sequence[Part]) -> Dropped | Seeded:
    """What adapters with this dropout see of ``x``, in training."""
    call = draws.call()
    if call is not None:
        seeds = call.seeds(x)
        return Seeded(seeds, p) if _regenerates(x, parts) else Dropped(*masked_input(x, seeds, p))
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return Dropped(F.dropout(x, p))
    if _regenerates(x, parts):
        return Seeded(kernels.draw_seed(x), p)
    seen, mask = torch.native_dropout(x, p, True)
    return Dropped(seen, mask, 1.0 / (1.0 - p))


def shares_dropout(x: Tensor, parts: Sequence[Part]) -> bool:
    """Whether these layers can have one dropout of their input, whose mask is never stored.

    On a GPU, or where adapters have draws of their own: else, on a CPU, each layer draws a mask of
    its own, from one seed the same as PEFT's.
    """
    return draws.call() is not None or _regenerates(x, parts)


def _regenerates(x: Tensor, parts: Sequence[Part]) -> bool:
    """Whether the mask can be computed again, instead of being stored."""
    if torch.compiler.is_compiling():
        return False
    return kernels.can_regenerate(x, sum(part.A[0].shape[0] for part in parts))
