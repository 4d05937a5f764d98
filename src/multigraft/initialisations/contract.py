"""What an initialisation is: where LoRA's A and B begin.

    ΔW = s (B A - B₀ A₀)        A₀, B₀: where A and B began, kept frozen beside them

Most begin at B = 0, where there is nothing to keep. Those that begin at a part of the base's own
weight (PiSSA, OLoRA, CorDA, LoRA-GA) say `takes_out`: the papers train A and B beside the rest of
the weight, W - s B₀ A₀. Here the base keeps its bits, since it is other adapters' base as well, and
what was taken out is subtracted beside it:

    B A - B₀ A₀ = B (A - A₀) + (B - B₀) A₀

a pair of twice the rank that is exactly zero until something is trained.

An initialisation is one file: a class that is registered by the name that `init_lora_weights` has.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from multigraft.bases import Geometry
from multigraft.config import require
from multigraft.errors import ConfigError, MultigraftWarning, did_you_mean
from multigraft.methods.contract import Params, TensorSpec
from multigraft.registry import Registry
from multigraft.site import Site

START_A, START_B = "lora_initial_A.weight", "lora_initial_B.weight"
"""Names, in memory and on disk, of where A and B began; files of PEFT lack them."""

MATRICES = frozenset({"linear", "conv1d_transposed"})
"""Geometries whose weight is one matrix."""


class LowRank(Protocol):
    """What an initialisation sees of LoRA at a site."""

    site: Site
    config: Any
    A: str
    B: str
    rank: int
    scaling: float
    variant: Any

    @property
    def geometry(self) -> Any:
        """How the site's layer is shaped."""


class Initialisation:
    """Base of every initialisation."""

    name: ClassVar[str]
    takes_out: ClassVar[bool] = False
    """Whether it begins at a part of the base's weight, which is then kept; see the module."""
    from_weight: ClassVar[bool] = False
    """Whether it begins at a product of the rank that follows from the weight, as all that
    `takes_out` do, over the scaling."""
    geometries: ClassVar[frozenset[str] | None] = None
    """Names of the geometries that it is for; None for all."""
    plain_on: ClassVar[frozenset[str]] = frozenset()
    """Names of geometries that may be among the targets all the same, and where plain LoRA begins
    in its place, as in PEFT."""
    option: ClassVar[str | None] = None
    """The field of the config that holds its options."""
    options: ClassVar[type | None] = None
    """The dataclass of these."""

    @classmethod
    def reads(cls, value: str) -> Initialisation | None:
        """The initialisation when ``value``, in lower case, means this one."""
        return cls() if value == cls.name else None

    def at(self, geometry: Geometry) -> Initialisation:
        """What begins at a layer of this kind: this one, or plain LoRA."""
        return Plain() if geometry.name in self.plain_on else self

    def refusal(self, lora: LowRank) -> str | None:
        """Why it cannot begin at this site, and what to do; ``None`` when it can."""
        name = lora.geometry.name
        if self.geometries is not None and name not in self.geometries:
            return (
                f'`init_lora_weights="{self.name}"` is for linear layers, not for {name}; leave '
                "this layer to another adapter with `init_lora_weights=True`, or out of "
                "`target_modules`"
            )
        if self.takes_out and lora.variant is not None and not lora.variant.takes_starts:
            return (
                f'`init_lora_weights="{self.name}"` takes a part out of the base, which '
                f"{lora.variant.name} does not know of; leave one of them out"
            )
        if not (self.takes_out or self.from_weight):
            return None
        if lora.scaling <= 0:
            return (
                f'`init_lora_weights="{self.name}"` divides by the scaling (={lora.scaling:g}); '
                "choose a positive `lora_alpha`"
            )
        smaller = min(lora.geometry.sizes(lora.site.layer))
        if lora.rank > smaller:
            return (
                f"the rank (={lora.rank}) must be at most {smaller}, the layer's smaller size, for "
                f'`init_lora_weights="{self.name}"`; lower `r`, or set it in `rank_pattern`'
            )
        return None

    def tensors(self, lora: LowRank) -> dict[str, TensorSpec]:
        """Tensors beside A and B."""
        if not self.takes_out:
            return {}
        in_, out = lora.geometry.sizes(lora.site.layer)
        start = TensorSpec((lora.rank, in_), trainable=False, buffer=True, optional=True)
        return {START_A: start, START_B: start._replace(shape=(out, lora.rank))}

    def fill(self, lora: LowRank, A: Tensor, B: Tensor) -> None:
        """Write the initial values into A and B."""
        raise NotImplementedError(f"{type(self).__name__} must define `fill`")

    def reset(self, lora: LowRank, params: Params) -> None:
        """Fill A and B, and keep where they began if they `takes_out`."""
        self.fill(lora, params[lora.A], params[lora.B])
        if self.takes_out:
            params[START_A].copy_(params[lora.A])
            params[START_B].copy_(params[lora.B])

    def recover(self, lora: LowRank, params: Params, missing: Collection[str]) -> None:
        """Fill those of its `tensors` that a file lacks which has A and B.

        Args:
            params: all of the adapter's tensors; writes to others than ``missing`` are dropped.
        """
        self.reset(lora, params)


class Plain(Initialisation):
    """B = 0, so that nothing changes, and A as `nn.Linear` begins.

    On an embedding A is zero and B normal: each column of A is one token's code.
    """

    def fill(self, lora: LowRank, A: Tensor, B: Tensor) -> None:
        if lora.geometry.name == "embedding":
            nn.init.zeros_(A)
            nn.init.normal_(B)
        else:
            self.fill_a(lora, A)
            nn.init.zeros_(B)

    def fill_a(self, lora: LowRank, A: Tensor) -> None:
        """Write A's values where B is zero."""
        kaiming(A)


def kaiming(tensor: Tensor) -> None:
    """Kaiming uniform with ``a = sqrt(5)``: the bound is 1 / sqrt(fan in)."""
    bound = 1 / math.sqrt(max(1, tensor[0].numel()))
    tensor.uniform_(-bound, bound)


def moved(A: Tensor, B: Tensor, params: Params) -> tuple[Tensor, Tensor]:
    """A pair whose product is how far B A has moved from B₀ A₀; exactly zero where it has not.

    Differences first: factors that are rounded afterwards, for a half-precision forward, lose no
    more than their own last bits, where the difference of two rounded products would lose most.

    Args:
        A, B: the factors now, ``(rank, in)`` and ``(out, rank)``.
        params: the adapter's tensors, where A and B began among them.

    Returns:
        ``(2 rank, in)`` and ``(out, 2 rank)``.
    """
    A0, B0 = params[START_A], params[START_B]
    return torch.cat([A - A0, A0]), torch.cat([B, B - B0], dim=1)


INITIALISATIONS: Registry[type[Initialisation]] = Registry("initialisation")
"""Initialisations by the name that `init_lora_weights` has."""

I = TypeVar("I", bound=type[Initialisation])  # noqa: E741 (what it stands for)


def initialisation(name: str) -> Callable[[I], I]:
    """Register an initialisation."""

    def add(cls: I) -> I:
        cls.name = name
        INITIALISATIONS.register(name, cls)
        _read.cache_clear()
        return cls

    return add


def initialisation_for(config: Any) -> Initialisation:
    """The initialisation that a config's `init_lora_weights` means.

    Raises:
        ConfigError: it means none.
    """
    value = config.init_lora_weights
    found = _read(str(value).lower()) if isinstance(value, (bool, str)) else None
    if found is not None:
        return found
    names = [name for name in INITIALISATIONS if name not in ("true", "false")]
    listed = ", ".join(f'"{name}"' for name in names)
    raise ConfigError(
        f"{type(config).__name__}: `init_lora_weights` (={value!r}) must be True, False or one of "
        f"{listed}.{did_you_mean(str(value), names)}"
    )


@lru_cache(maxsize=64)
def _read(value: str) -> Initialisation | None:
    """Looked up once for all sites of an adapter."""
    readings = (cls.reads(value) for _, cls in INITIALISATIONS.items())
    return next((found for found in readings if found is not None), None)


def settle_options(config: Any) -> None:
    """Check `init_lora_weights` and make its options, tables in files, what they stand for.

    Raises:
        ConfigError: a value is not allowed, or the initialisation needs other options.
    """
    chosen = initialisation_for(config)
    for _, cls in INITIALISATIONS.items():
        if cls.option is None or cls.options is None:
            continue
        value = getattr(config, cls.option)
        if not value and cls is type(chosen):
            value = cls.options()
        elif value and cls is not type(chosen):
            warnings.warn(
                f'`{cls.option}` has no effect without `init_lora_weights="{cls.name}"`.',
                MultigraftWarning,
                stacklevel=5,
            )
        if value:
            setattr(config, cls.option, _as_options(config, cls.option, cls.options, value))


def _as_options(config: Any, field: str, kind: type, value: Any) -> Any:
    if isinstance(value, kind):
        return value
    where = type(config).__name__
    require(isinstance(value, Mapping), where, field, value, f"a {kind.__name__}, or a dictionary")
    known = [f.name for f in dataclasses.fields(kind)]
    unknown = next((key for key in value if key not in known), None)
    if unknown is not None:
        raise ConfigError(
            f"{where}: `{field}` has no option `{unknown}`; there are {', '.join(known)}."
            + did_you_mean(str(unknown), known)
        )
    return kind(**value)
