"""Autocast, asked of tensors on any device: torch's own question fails on the meta device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def is_autocasting(tensor: Tensor) -> bool:
    """Whether products on this tensor's device are cast now; without memory nothing is."""
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """A block in which nothing on this tensor's device is cast."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)
