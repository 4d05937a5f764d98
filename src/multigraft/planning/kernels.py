"""Operators whose form depends on the device, on the meta device as they would be on another.

Left to itself, torch runs attention there in the form that keeps every weight. What the fused
kernels of CPUs and GPUs keep for the backward pass is alike: q, k, v, the output, and one number
for each query and head; and a mask, made additive first. Attention that a model computes by itself,
in plain operators, is counted as it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

WITHOUT_HEADS = 3
"""Dimensions of queries that have no heads."""


class KernelsOf(TorchFunctionMode):
    """While it is entered, meta tensors are computed with as a device of this kind would.

    `Tensor.backward` would leave it; `torch.autograd.backward` stays inside.

    Args:
        kind: ``"cpu"``, or any other for GPUs.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.table = ON_CPU if kind == "cpu" else ON_GPU

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        run = self.table.get(func)
        if run is not None and args and isinstance(args[0], Tensor) and args[0].is_meta:
            return run(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def attention_on_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention`, whose fused kernel knows neither dropout nor some masks."""
    takes_gradient = attn_mask is not None and attn_mask.requires_grad
    is_shared = query.dim() > WITHOUT_HEADS and query.shape[-3] != key.shape[-3]
    if dropout_p or takes_gradient or is_shared or query.dim() != WITHOUT_HEADS + 1:
        with torch._C.DisableTorchFunction():
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
                enable_gqa=enable_gqa,
            )  # fmt: skip
    return _fused(query, key, value, attn_mask, is_causal, scale)


def attention_on_gpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention`; dropout is drawn again from a seed in the backward pass."""
    if attn_mask is not None:
        attn_mask = attn_mask.detach()  # its own gradient is computed from what is kept anyway
    if query.dim() == WITHOUT_HEADS:
        q, k, v = (tensor.unsqueeze(1) for tensor in (query, key, value))
        return _fused(q, k, v, attn_mask, is_causal, scale).squeeze(1)
    return _fused(query, key, value, attn_mask, is_causal, scale)


def _fused(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype)
    run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return run(q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale)[0]


def dropout_on_gpu(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """`F.dropout`, which keeps a mask of one byte an element."""
    return torch.native_dropout(input, p, True)[0] if training and 0 < p < 1 else input


ON_CPU: dict[Any, Callable[..., Tensor]] = {F.scaled_dot_product_attention: attention_on_cpu}
ON_GPU: dict[Any, Callable[..., Tensor]] = {
    F.scaled_dot_product_attention: attention_on_gpu,
    F.dropout: dropout_on_gpu,
}
