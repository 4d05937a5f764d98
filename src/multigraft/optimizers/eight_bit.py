"""AdamW whose state takes a byte a value, by bitsandbytes.

    state: blocks of 256 values, each a byte and a share of the block's largest

Tensors of fewer than 4096 values keep a float32 state; there is nothing to gain.

Paper: Dettmers et al. 2021, arXiv:2110.02861.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from multigraft.errors import MissingExtraError


def adamw8bit(parameters: Iterable[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    """``AdamW8bit``.

    Args:
        options: ``lr``, ``weight_decay``, ``betas``, ``eps``, and what bitsandbytes takes besides.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
    """
    return _of_bitsandbytes("AdamW8bit", "adamw8bit")(list(parameters), **options)


def paged_adamw8bit(parameters: Iterable[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    """The same, whose state moves to the host while the GPU has no room for it.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
    """
    return _of_bitsandbytes("PagedAdamW8bit", "paged_adamw8bit")(list(parameters), **options)


def _of_bitsandbytes(name: str, asked: str) -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise MissingExtraError(
            f"optimiser `{asked}` needs bitsandbytes: pip install 'multigraft[quant]'. `adamw` "
            "needs nothing."
        ) from error
    return getattr(bitsandbytes.optim, name)
