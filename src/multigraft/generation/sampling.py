"""How the next token is chosen: the likeliest, or one drawn by a row's own random numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from multigraft.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """What the caller chose.

    Args:
        max_new_tokens: where an answer that does not end is cut.
        temperature: 0 takes the likeliest token each time; 1 draws from the model's distribution.
        top_p: only the likeliest tokens that together have this share are drawn.
        top_k: only so many of the likeliest are drawn; 0 means all.
        seed: the same one gives the same text, whatever else is in the batch.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        _require("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1")
        is_warmth = math.isfinite(self.temperature) and self.temperature >= 0
        _require("temperature", self.temperature, is_warmth, "a number from 0")
        _require("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _require("top_k", self.top_k, self.top_k >= 0, "at least 0")
        is_seed = 0 <= self.seed < 1 << 63
        _require("seed", self.seed, is_seed, "a whole number from 0, below 2^63")


def _require(name: str, value: float, holds: bool, what: str) -> None:
    if not holds:
        raise ConfigError(f"`{name}` (={value}) must be {what}.")


class Draws:
    """Turns scores into others of which the largest is a draw from what the caller chose.

        argmax(log p / T + g)        g: Gumbel noise from the row's own generator

    is a sample of softmax(log p / T). So rows draw by themselves: a text does not depend on which
    others are in the batch, and the same prompt to several adapters meets the same chances.

    Args:
        keys: one per row; rows of the same key draw the same numbers.
    """

    def __init__(self, sampling: Sampling, keys: Sequence[int]) -> None:
        self.sampling = sampling
        self.generators = []
        for key in keys:
            mixed = (sampling.seed * 0x9E3779B97F4A7C15 + key * 0xD1B54A32D192ED03) % (1 << 63)
            self.generators.append(torch.Generator().manual_seed(mixed))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores ``(rows, vocabulary)`` with noise, -inf where nothing may be drawn."""
        scores = scores.float()
        if self.sampling.temperature == 0:
            return scores
        scores = _nucleus(
            _likeliest(scores / self.sampling.temperature, self.sampling.top_k), self.sampling.top_p
        )
        size = scores.shape[-1]
        chances = torch.stack([torch.rand(size, generator=g) for g in self.generators])
        noise = -torch.log(-torch.log(chances.clamp_(1e-20, 1 - 2**-24)))
        return scores + noise.to(scores.device)


def _likeliest(scores: Tensor, top_k: int) -> Tensor:
    if not 0 < top_k < scores.shape[-1]:
        return scores
    least = scores.topk(top_k, -1).values[:, -1:]
    return scores.masked_fill(scores < least, -math.inf)


def _nucleus(scores: Tensor, top_p: float) -> Tensor:
    """Without the tokens before which the likelier ones have the share already."""
    if top_p >= 1:
        return scores
    ordered, order = scores.sort(-1, descending=True)
    shares = ordered.softmax(-1)
    is_out = shares.cumsum(-1) - shares >= top_p
    return scores.masked_fill(is_out.scatter(-1, order, is_out), -math.inf)
