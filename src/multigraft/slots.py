"""Slots: places for LoRA adapters of any rank up to a maximum, in tensors that never change shape.

    y = W x + B (s A) x        A: (most, in)   B: (out, most)   s: ()

The rows of A and columns of B beyond the adapter's own rank are zero, and its scale is a tensor: so
another adapter can be put in by writing values, and nothing that was compiled, captured or
allocated for the layer has to be made again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from multigraft.config import pattern_value
from multigraft.containers import fetch, hold
from multigraft.draws import dropout
from multigraft.graft import Graft
from multigraft.layer import AdaptedLayer
from multigraft.methods.contract import Params, TensorSpec
from multigraft.methods.lora import LoRA, LoraConfig
from multigraft.site import Site

SCALE = "lora_slot_scale"


class Slotted(LoRA):
    """LoRA at one site, in a slot.

    Args:
        most: the slot's rank; the config's by default.
        is_fixed: whether it stays at that rank, since something may be compiled for it.
    """

    def __init__(
        self, site: Site, config: LoraConfig, most: int = 0, is_fixed: bool = False
    ) -> None:
        self.is_fixed = is_fixed
        self.place: tuple[nn.Module, str] | None = None
        """Where the scale's tensor is held."""
        super().__init__(site, config)
        self.most = max(most, self.rank)

    @property
    def scaling(self) -> float:
        """The scale as a number; forwards read the tensor."""
        return self._scaling

    @scaling.setter
    def scaling(self, value: float) -> None:
        self._scaling = value
        if self.place is not None:
            with torch.no_grad():
                fetch(*self.place).fill_(value)

    def tensors(self) -> dict[str, TensorSpec]:
        a, b = self.geometry.factor_shapes(self.site.layer, self.most)
        scale = TensorSpec((), trainable=False, buffer=True, saved=False)
        is_used = self.rank > 0
        return {
            self.A: TensorSpec(a, saved=is_used),
            self.B: TensorSpec(b, saved=is_used),
            SCALE: scale,
        }

    def factors(self, params: Params) -> tuple[Tensor, Tensor]:
        A, scale = params[self.A], params[SCALE]
        return A * scale.to(A.dtype), params[self.B]

    def low_rank(self, params: Params) -> tuple[Tensor, Tensor, float] | None:
        return (*self.factors(params), 1.0)

    def apply_factors(self, params: Params, x: Tensor) -> Tensor:
        A, B = self.factors(params)
        dtype = self.geometry.input_dtype(x, A)
        h = self.geometry.project(self.site.layer, x, A.to(dtype))
        return self.geometry.lift(self.site.layer, h, B.to(h.dtype))

    def add(
        self, params: Params, y: Tensor, x: Tensor, training: bool, base: Tensor | None = None
    ) -> Tensor:
        if self.dropout and training:
            x = dropout(x, self.dropout)
        A, B = self.factors(params)
        dtype = self.geometry.input_dtype(x, A)
        return self.geometry.add_low_rank(self.site.layer, y, x, A.to(dtype), B.to(dtype), 1.0)

    def delta(self, params: Params, W: Tensor | None = None) -> Tensor:
        return self.geometry.product(self.site.layer, *self.factors(params))

    def add_delta(self, params: Params, value: Tensor, W: Tensor | None = None) -> Tensor:
        A, B = self.factors(params)
        return self.geometry.add_product(self.site.layer, value, A, B, 1.0)

    def from_tied(self, params: Params) -> Params:
        return {**super().from_tied(params), SCALE: params[SCALE]}

    def packed(self, name: str, tensor: Tensor) -> Tensor:
        return self.resized(name, tensor, self.most, self.rank)

    def unpacked(self, name: str, value: Tensor, tensor: Tensor) -> Tensor:
        return self.resized(name, value, self.rank, self.most)

    def rank_by(self, config: LoraConfig) -> int:
        """The rank that a config gives this site."""
        rank: int = pattern_value(config.rank_pattern, self._named, config.r)
        return rank

    def become(self, config: LoraConfig, rank: int) -> None:
        """Be the adapter of another config from now on; its values are written apart.

        Args:
            rank: its own here; zero where it has nothing.
        """
        self.config, self.rank = config, rank
        self.dropout = 0.0 if self.geometry.name == "embedding" else config.lora_dropout
        self.alpha = pattern_value(config.alpha_pattern, self._named, config.lora_alpha)
        ratio = math.sqrt(rank) if config.use_rslora else rank
        self.scaling = self.site.times * self.alpha / ratio if rank else 0.0

    def resized(self, name: str, value: Tensor, own: int, rank: int) -> Tensor:
        """A factor of rank ``own`` with zeros up to ``rank``, or without what lies beyond it."""
        if own == rank or name not in (self.A, self.B):
            return value
        layer, geometry, is_a = self.site.layer, self.geometry, name == self.A
        empty = [value.new_empty(s) for s in geometry.factor_shapes(layer, own)]
        both = (value, empty[1]) if is_a else (empty[0], value)
        a, b = geometry.pairs(layer, *both)  # in blocks of their own: groups, experts
        kept, more = a.shape[1] * min(own, rank) // own, a.shape[1] * max(0, rank - own) // own
        a = nn.functional.pad(a[:, :kept], (0, 0, 0, more))
        b = nn.functional.pad(b[:, :, :kept], (0, more))
        return geometry.from_pairs(layer, a, b)[0 if is_a else 1].contiguous()

    @property
    def _named(self) -> str:
        return (self.site.tied or self.site).target


def slot_refusal(graft: Graft) -> str | None:
    """Why this graft cannot be held in a slot, or ``None``."""
    lora = graft.method
    if not isinstance(lora, LoRA):
        return f"{graft.site} is adapted by {lora.name}"
    if lora.variant is not None:
        return f"{graft.site} has the variant {lora.variant.name}"
    if lora.bias or lora.start.takes_out:
        return f"{graft.site} has {'`lora_bias`' if lora.bias else '`init_lora_weights`'}"
    return None


@torch.no_grad()
def into_slot(layer: AdaptedLayer, graft: Graft, most: int, is_fixed: bool = False) -> Slotted:
    """Move one LoRA graft into a slot of this rank; its outputs stay what they are.

    Parameters that grow are new objects: an optimiser must be made afterwards.
    """
    lora = graft.method
    assert isinstance(lora, LoRA), "asked `slot_refusal` first"
    own = lora.most if isinstance(lora, Slotted) else lora.rank
    slotted = Slotted(graft.site, lora.config, max(most, own), is_fixed)
    slotted.rank, slotted.scaling, slotted.alpha = lora.rank, lora.scaling, lora.alpha
    graft.method, graft.own_specs = slotted, slotted.tensors()
    if graft.tied is not None:  # its tensors are the other site's
        slotted.place = graft.owners[SCALE]
        return slotted
    for name in (lora.A, lora.B):
        owner, leaf = graft.owners[name]
        tensor = fetch(owner, leaf)
        if own != slotted.most:
            grown = slotted.resized(name, tensor.detach(), own, slotted.most)
            hold(owner, leaf, nn.Parameter(grown, requires_grad=tensor.requires_grad))
    if SCALE not in graft.owners:
        scale = torch.tensor(slotted.scaling, device=fetch(*graft.owners[lora.A]).device)
        layer.add_buffer(graft, SCALE, scale)
    slotted.place = graft.owners[SCALE]
    return slotted
