"""Base layer and low-rank adapters in one node, where a layer and its adapters allow it.

Everything else runs part by part in `AdaptedLayer._run`, with the same result to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from multigraft import kernels
from multigraft.bank import pair, scales
from multigraft.graft import Graft


def fused(grafts: Sequence[Graft], x: Tensor, training: bool) -> Tensor | None:
    """The base layer's output plus what these adapters add, or None where parts must run alone.

    Args:
        grafts: at least one, all of one site.
        x: the base layer's input, ``(..., in)``.
    """
    site = grafts[0].site
    if site.geometry is None or torch.is_autocast_enabled(x.device.type):
        return None
    base = site.geometry.frozen_matrix(site.layer)
    if base is None or base[0].dtype != x.dtype:
        return None
    W, bias = base
    is_single = len(grafts) == 1
    if is_single:
        own = grafts[0].method.with_base(grafts[0].params, x, W, bias, training)
        if own is not None:
            return own
    pairs = [pair(graft, training, dropout=is_single) for graft in grafts]
    whole = [found for found in pairs if found is not None]
    if len(whole) < len(pairs):
        return None
    if is_single:
        A, B, scale = whole[0]
        p = grafts[0].method.dropout if training else 0.0
        seen = torch.nn.functional.dropout(x, p) if p else None
        return kernels.adapted_linear(x, W, bias, A, B, scale, seen)
    As, Bs, values = zip(*whole, strict=True)
    columns = [value for A, value in zip(As, values, strict=True) for _ in range(A.shape[0])]
    wide = scales(tuple(columns), x.dtype, x.device)
    return kernels.adapted_linear(x, W, bias, torch.cat(As), torch.cat(Bs, dim=1), wide)
