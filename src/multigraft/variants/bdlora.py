"""Block-diagonal LoRA (BD-LoRA): one of the two factors is block-diagonal, so that it shards.

    A = diag(A_1, …, A_n)   A_i: (rank / n, in / n)    or    B = diag(B_1, …, B_n)

A is held as its blocks one below the other, ``(rank, in / n)``; B likewise, ``(out, rank / n)``.
With n devices that each hold one part of the layer, each needs its own block and no others'.

Paper: Wang et al. 2025, arXiv:2510.23346. Blocks of A begin Kaiming uniform with ``a = 0``, as in
PEFT, unless the config names another initialisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from multigraft.config import check_names, require
from multigraft.methods.contract import Method, Params, TensorSpec
from multigraft.variants.contract import Variant, variant

PLAIN_STARTS = (True, False, "gaussian")


@dataclass
class BdLoraConfig:
    """Which factors are block-diagonal.

    Args:
        target_modules_bd_a: layers whose A is: parts of their paths. Those that are sharded by
            rows: ``["o_proj", "down_proj"]``.
        target_modules_bd_b: layers whose B is. Those that are sharded by columns:
            ``["q_proj", "k_proj", "v_proj", "up_proj", "gate_proj"]``.
        nblocks: number of blocks; the number of devices that serve the model.
        match_strict: refuse targets of neither list, rather than give them a plain pair.

    Raises:
        ConfigError: a value is not allowed, or a name is in both lists.
    """

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: int = 1
    match_strict: bool = True

    def __post_init__(self) -> None:
        where = "BdLoraConfig"
        for name in ("target_modules_bd_a", "target_modules_bd_b"):
            setattr(self, name, check_names(where, name, getattr(self, name)))
        n = self.nblocks
        is_count = isinstance(n, int) and not isinstance(n, bool) and n > 0
        require(is_count, where, "nblocks", n, "an integer of at least 1")
        is_switch = isinstance(self.match_strict, bool)
        require(is_switch, where, "match_strict", self.match_strict, "True or False")
        both = sorted({*(self.target_modules_bd_a or ())} & {*(self.target_modules_bd_b or ())})
        required = "without the names in `target_modules_bd_b`: one factor is block-diagonal"
        require(not both, where, "target_modules_bd_a", both, required)


@variant("bdlora")
class BdLora(Variant):
    """A plain pair with zeros outside the blocks."""

    is_pair = True
    option = "use_bdlora"
    options = BdLoraConfig

    @classmethod
    def selected(cls, config: Any) -> bool:
        return config.use_bdlora is not None

    def refusal(self, lora: Method) -> str | None:
        if not lora.geometry.is_matmul or lora.site.rebinds:
            return "`use_bdlora` is for linear layers that run; use plain LoRA for this one"
        if lora.config.init_lora_weights not in PLAIN_STARTS:
            return (
                f"`use_bdlora` begins with blocks of its own, not as "
                f"{lora.config.init_lora_weights!r} does; set `init_lora_weights` to True"
            )
        options, path = lora.config.use_bdlora, lora.site.target
        in_a = _matches(path, options.target_modules_bd_a)
        in_b = _matches(path, options.target_modules_bd_b)
        if in_a and in_b:
            return (
                "both `target_modules_bd_a` and `target_modules_bd_b` hold a part of its path; "
                "name it in one of them"
            )
        if options.match_strict and not (in_a or in_b):
            return (
                "neither `target_modules_bd_a` nor `target_modules_bd_b` of `use_bdlora` holds a "
                "part of its path; name it there, or set `match_strict` to False"
            )
        if in_b and lora.config.lora_bias:
            return "`lora_bias` has no place in the file of a block-diagonal B; leave it False"
        return self._size_refusal(lora, in_a)

    def _size_refusal(self, lora: Method, in_a: bool) -> str | None:
        """Why the sizes cannot be divided, or ``None``."""
        factor = _blocked(lora)
        if factor is None:
            return None
        n = lora.config.use_bdlora.nblocks
        in_, out = lora.geometry.sizes(lora.site.layer)
        size, name = (in_, "in") if in_a else (out, "out")
        if lora.rank % n or size % n:
            return (
                f"`nblocks` (={n}) of `use_bdlora` must divide the rank (={lora.rank}) and the "
                f"layer's `{name}` (={size})"
            )
        return None

    def tensors(self, lora: Method) -> dict[str, TensorSpec]:
        factor = _blocked(lora)
        if factor is None:
            return {}
        rows, columns = _shapes(lora)[factor]
        return {factor: TensorSpec((rows, columns // lora.config.use_bdlora.nblocks))}

    def reset(self, lora: Method, params: Params) -> None:
        if _blocked(lora) == lora.geometry.factors[0] and lora.config.init_lora_weights is True:
            nn.init.kaiming_uniform_(params[lora.geometry.factors[0]])

    def pair(self, lora: Method, params: Params) -> tuple[Tensor, Tensor]:
        factor, n = _blocked(lora), lora.config.use_bdlora.nblocks
        A, B = (
            torch.block_diag(*params[name].chunk(n)) if name == factor else params[name]
            for name in lora.geometry.factors
        )
        return A, B


def _matches(path: str, parts: list[str] | None) -> bool:
    """Whether a path holds any of these, as files mean it."""
    return any(part in path for part in parts or ())


def _blocked(lora: Method) -> str | None:
    """Name of the factor that is block-diagonal at this site, if one is."""
    options, path = lora.config.use_bdlora, lora.site.target
    if _matches(path, options.target_modules_bd_a):
        return lora.geometry.factors[0]
    return lora.geometry.factors[1] if _matches(path, options.target_modules_bd_b) else None


def _shapes(lora: Method) -> dict[str, tuple[int, ...]]:
    """Shapes of the plain factors."""
    shapes = lora.geometry.factor_shapes(lora.site.layer, lora.rank)
    return dict(zip(lora.geometry.factors, shapes, strict=True))
