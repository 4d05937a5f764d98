"""Embeddings: the shrink is a lookup in A, the expand a product with B.

ΔW = (B A)ᵀ        A: (rank, vocabulary)   B: (dim, rank)   W: (vocabulary, dim)
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multigraft.bases.contract import GEOMETRIES, Geometry


class Embedding(Geometry):
    """``nn.Embedding`` and transformers' scaled embeddings (``embed_scale``)."""

    name = "embedding"
    factors = ("lora_embedding_A", "lora_embedding_B")

    def sizes(self, layer: nn.Module) -> tuple[int, int]:
        return int(layer.num_embeddings), int(layer.embedding_dim)  # type: ignore[arg-type]

    def project(self, layer: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        return self.run(layer, x, A.T)

    def run(self, layer: nn.Module, x: Tensor, W: Tensor) -> Tensor:
        emb = cast(Any, layer)
        h = F.embedding(
            x,
            W,
            padding_idx=emb.padding_idx,
            max_norm=emb.max_norm,
            norm_type=emb.norm_type,
            scale_grad_by_freq=emb.scale_grad_by_freq,
            sparse=emb.sparse,
        )
        # Gemma's and BART's embeddings multiply their output, so an update is multiplied as well.
        return h * getattr(emb, "embed_scale", 1.0)

    def row_sizes(self, layer: nn.Module) -> tuple[int, int]:
        return self.sizes(layer)

    def exchange_rows(
        self, layer: nn.Module, y: Tensor, x: Tensor, index: Tensor, own: Tensor, new: Tensor
    ) -> Tensor:
        emb = cast(Any, layer)
        if emb.padding_idx is not None:  # which gets no gradient
            new = torch.where((index == emb.padding_idx)[:, None], new.detach(), new)
        # Each token's place among the sorted indices: no table of the vocabulary is made.
        index, order = index.sort()
        place = torch.searchsorted(index, x).clamp(max=len(index) - 1)
        is_there = (index[place] == x).unsqueeze(-1)
        scale = getattr(emb, "embed_scale", 1.0)
        before, after = (F.embedding(place, rows[order]) * scale for rows in (own, new))
        # In this order the new rows come out exactly where nobody else changed them.
        return torch.where(is_there, (y - before).to(y.dtype) + after.to(y.dtype), y)

    def understands(self, layer: nn.Module) -> bool:
        return hasattr(layer, "embed_scale") or super().understands(layer)

    def lift(self, layer: nn.Module, h: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(h, B, bias)

    def product(self, layer: nn.Module, A: Tensor, B: Tensor) -> Tensor:
        return (B @ A).T

    def matrices(self, layer: nn.Module, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor] | None:
        return A.T, B.T

    def as_matrix(self, layer: nn.Module, W: Tensor) -> Tensor:
        return W.T

    def from_matrix(self, layer: nn.Module, M: Tensor) -> Tensor:
        return M.T


GEOMETRIES.register(nn.Embedding)(Embedding())
