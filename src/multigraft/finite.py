"""Whether a tensor holds NaN or infinity, asked of one sum."""

from __future__ import annotations

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether every element is; of meta tensors, and of counts, it is.

    A sum is spoilt by any NaN or infinity, and takes a tenth of the time that looking at each
    element does. That of finite values may overflow; then each is looked at.
    """
    if tensor.is_meta or not tensor.is_floating_point():
        return True
    own = tensor.detach()
    own = own.float() if own.dtype.itemsize == 1 else own  # which have no arithmetic
    wide = torch.promote_types(own.dtype, torch.float32)
    return bool(torch.isfinite(own.sum(dtype=wide))) or bool(torch.isfinite(own).all())
