"""Where tensors of several layers and adapters are in the wide products of `adapted_linears`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Part(NamedTuple):
    """One of the layers: its frozen weight and bias, and a pair and a scale for each adapter."""

    W: Tensor
    bias: Tensor | None
    A: tuple[Tensor, ...]
    B: tuple[Tensor, ...]
    scale: tuple[float, ...]


class Stack(NamedTuple):
    """Factors as the products take them: A of all layers together, and each layer's B.

    With several adapters, ``(adapters, Σ rank, in)`` and ``(adapters, out, rank)``.
    """

    A: Tensor
    Bs: list[Tensor]

    @staticmethod
    def of(parts: Sequence[Part], dtype: torch.dtype) -> Stack:
        """The factors of these layers, in this dtype."""
        tensors: list[Tensor | None] = []
        for part in parts:
            tensors += (part.W, part.bias, *part.A, *part.B)
        return layout_for(parts).stacked(tensors, dtype)


class Layout:
    """Where the layers' tensors are among a node's inputs, and their columns in the wide product.

    Args:
        parts: each layer's scales and ranks, by adapter; ranks that differ are padded with zeros.
    """

    def __init__(self, parts: tuple[tuple[tuple[float, ...], tuple[int, ...]], ...]) -> None:
        self.adapters = len(parts[0][0])
        self.layers = len(parts)
        self.ranks = [ranks for _, ranks in parts]
        self.rank = [max(ranks) for ranks in self.ranks]
        starts = [sum(self.rank[:index]) for index in range(self.layers + 1)]
        self.columns = list(zip(starts, self.rank, strict=False))
        """Start and length of each layer's columns of s."""
        self.scale = [scale[0] if len(set(scale)) == 1 else 1.0 for scale, _ in parts]
        self.uneven: tuple[tuple[float, ...], ...] | None = None
        """Where a layer's adapters differ in scale: factors of s, by adapter and column."""
        if any(len(set(scale)) > 1 for scale, _ in parts):
            self.uneven = tuple(
                tuple(
                    scale[adapter] if len(set(scale)) > 1 else 1.0
                    for (scale, _), rank in zip(parts, self.rank, strict=True)
                    for _ in range(rank)
                )
                for adapter in range(self.adapters)
            )
        self.size = 2 + 2 * self.adapters
        self.firsts = range(0, self.layers * self.size, self.size)
        """Where each layer's tensors begin."""
        self.is_single = self.adapters == self.layers == 1
        self.rows = self.rank * self.adapters
        """Rows of the stacked A that each adapter has at each layer, adapter by adapter."""
        self.is_padded = any(
            set(own) != {most} for own, most in zip(self.ranks, self.rank, strict=True)
        )

    def stacked(self, tensors: Sequence[Tensor | None], dtype: torch.dtype) -> Stack:
        """The factors as the products take them."""
        n = self.adapters
        if self.is_single:
            A, B = required(tensors[2]), required(tensors[3])
            return Stack(A, [B]) if A.dtype == dtype else Stack(A.to(dtype), [B.to(dtype)])
        if n == 1:
            As = [required(tensors[i * self.size + 2]) for i in range(self.layers)]
            A = As[0] if self.layers == 1 else torch.cat(As)
            Bs = [required(tensors[i * self.size + 3]) for i in range(self.layers)]
        else:
            rows = [
                _padded(required(tensors[i * self.size + 2 + g]), self.rank[i], 0)
                for g in range(n)
                for i in range(self.layers)
            ]
            A = torch.cat(rows).view(n, -1, rows[0].shape[-1])
            Bs = [
                torch.stack(
                    [
                        _padded(required(B), self.rank[i], 1)
                        for B in tensors[i * self.size + 2 + n : (i + 1) * self.size]
                    ]
                )
                for i in range(self.layers)
            ]
        if A.dtype == dtype and all(B.dtype == dtype for B in Bs):
            return Stack(A, Bs)
        return Stack(A.to(dtype), [B.to(dtype) for B in Bs])

    def again(self, ready: list[Tensor], tensors: Sequence[Tensor], dtype: torch.dtype) -> Stack:
        """The stack, from those factors of it that are new tensors."""
        if len(ready) == 1 + self.layers:
            return Stack(ready[0], ready[1:])
        if len(ready) == 1:
            return Stack(ready[0], [tensors[i * self.size + 3] for i in range(self.layers)])
        return self.stacked(tensors, dtype)

    def split_A(self, dA: Tensor) -> list[list[Tensor]]:
        """The stacked A's gradient by layer and adapter."""
        parts: Sequence[Tensor] = dA.view(-1, dA.shape[-1]).split(self.rows)
        k = self.layers
        if self.is_padded:
            true = [ranks[g] for g in range(self.adapters) for ranks in self.ranks]
            parts = [part[:rank] for part, rank in zip(parts, true, strict=True)]
        return [list(parts[i::k]) for i in range(k)]

    def split_B(self, dB: Tensor, layer: int) -> list[Tensor]:
        """A layer's stacked B's gradient by adapter."""
        if self.adapters == 1:
            return [dB]
        parts = dB.unbind(0)
        return (
            [p[:, :rank] for p, rank in zip(parts, self.ranks[layer], strict=True)]
            if (self.is_padded)
            else list(parts)
        )

    def factors(self, s: Tensor) -> Tensor:
        """The uneven scales ``(adapters, 1, Σ rank)``, for s."""
        assert self.uneven is not None
        flat = tuple(value for row in self.uneven for value in row)
        found = constants(flat, s.dtype, s.device).view(self.adapters, 1, -1)
        return found if self.adapters > 1 else found[0]


def layout_for(parts: Sequence[Part]) -> Layout:
    """The layout of these layers; made once for each kind of them."""
    if len(parts) == 1 and len(parts[0].A) == 1 and not torch.compiler.is_compiling():
        return _single(parts[0].scale, parts[0].B[0].shape[-1])
    kinds = tuple([(part.scale, tuple([b.shape[-1] for b in part.B])) for part in parts])
    # Traced through, the cache would be an opaque call.
    return Layout(kinds) if torch.compiler.is_compiling() else _layout_of(kinds)


@lru_cache(maxsize=256)
def _layout_of(parts: tuple[tuple[tuple[float, ...], tuple[int, ...]], ...]) -> Layout:
    return Layout(parts)


@lru_cache(maxsize=256)
def _single(scale: tuple[float, ...], rank: int) -> Layout:
    """The layout of one layer with one adapter."""
    return Layout(((scale, (rank,)),))


def constants(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """These numbers as a tensor, made once: each copy to a device would wait for it."""
    if torch.compiler.is_compiling():
        return torch.tensor(values, dtype=dtype, device=device)
    return _constants(values, dtype, device)


@lru_cache(maxsize=256)
def _constants(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def _padded(factor: Tensor, rank: int, dim: int) -> Tensor:
    missing = rank - factor.shape[dim]
    return F.pad(factor, (0, missing) if dim else (0, 0, 0, missing)) if missing else factor


def required(tensor: Tensor | None) -> Tensor:
    """A tensor that is there; only biases may not be."""
    assert tensor is not None
    return tensor
