"""The base's weight as initialisations see it."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from multigraft.initialisations.contract import LowRank


def weight(lora: LowRank) -> Tensor:
    """The site's own weight as a matrix ``(out, in)``, in at least float32."""
    W = lora.site.weight().detach()
    wide = W.to(torch.promote_types(W.dtype, torch.float32))
    return cast(Tensor, lora.geometry.as_matrix(lora.site.layer, wide))
