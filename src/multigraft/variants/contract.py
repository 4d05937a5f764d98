"""What a variant is: another way to use LoRA's pair of factors at a site.

LoRA makes A and B, scales and drops out; a variant may add tensors and says how the pair acts. At
most one acts per adapter; each is one file, chosen by the options of the config that name it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from multigraft.config import require
from multigraft.errors import ConfigError, UnsupportedError, did_you_mean
from multigraft.kernels import AnyPart
from multigraft.methods.contract import Method, Params, TensorSpec
from multigraft.registry import Registry


class Variant:
    """Base of every variant. ``lora`` is the LoRA instance at the site: rank, scaling, factors."""

    name: ClassVar[str]
    option: ClassVar[str] = ""
    """The field of `LoraConfig` that holds its options, where they are an object of their own."""
    options: ClassVar[type[Any] | None] = None
    """That object's class, a dataclass; a dictionary in its place is read into it."""
    identity_at_init: ClassVar[bool] = True
    needs_weight: ClassVar[bool] = False
    needs_base: ClassVar[bool] = False
    has_exact_gradients: ClassVar[bool] = True
    mergeable: ClassVar[bool] = True
    by_token: ClassVar[bool] = False
    is_pair: ClassVar[bool] = False
    """Whether its tensors stand for a plain pair, which `pair` gives: it runs, merges and is served
    as that pair, and defines neither `add` nor `delta`."""
    derived: ClassVar[frozenset[str]] = frozenset()
    """Names of its tensors that follow from the base or from nothing, and that no file has."""
    takes_starts: ClassVar[bool] = False
    """Whether it reads A and B through LoRA's `factors` alone, so that they may begin anywhere."""
    combines: ClassVar[bool] = False
    """Whether adapters of it can be combined: `reset` gives, for any pair, tensors with which the
    variant acts as the plain pair does, and changes of them add up."""

    @classmethod
    def selected(cls, config: Any) -> bool:
        """Whether this config asks for the variant."""
        raise NotImplementedError(f"{cls.__name__} must define `selected`")

    @classmethod
    def check(cls, config: Any) -> None:
        """Check its options in any LoRA config, selected or not, and turn tables into configs.

        Raises:
            ConfigError: a value is not allowed.
        """
        value = None if cls.options is None else getattr(config, cls.option)
        if value is None or cls.options is None or isinstance(value, cls.options):
            return
        what = f"a {cls.options.__name__}, or a dictionary of its options, or None"
        require(isinstance(value, Mapping), "LoraConfig", cls.option, value, what)
        known = [field.name for field in dataclasses.fields(cls.options)]
        for name in value:
            if name not in known:
                raise ConfigError(
                    f"LoraConfig: `{cls.option}` has no option `{name}`."
                    f"{did_you_mean(str(name), known)} It has: {', '.join(known)}."
                )
        setattr(config, cls.option, cls.options(**value))

    def model_refusal(self, config: Any, model: nn.Module) -> str | None:
        """Why the variant cannot be had on this model, or ``None``."""
        return None

    def refusal(self, lora: Method) -> str | None:
        """Why the variant cannot act at this site, or ``None``."""
        return None

    def memory(self) -> Any:
        """What it remembers between calls at one site; held by the LoRA instance there."""
        return None

    def tensors(self, lora: Method) -> dict[str, TensorSpec]:
        """Tensors beside A and B."""
        return {}

    def reset(self, lora: Method, params: Params) -> None:
        """Fill them; A and B have their initial values by then."""

    def derive(self, lora: Method, params: Params) -> None:
        """Fill the `derived` ones alone, as `reset` does, without drawing numbers."""

    def pair(self, lora: Method, params: Params) -> tuple[Tensor, Tensor]:
        """The plain A and B that its tensors stand for."""
        plain: tuple[Tensor, Tensor] = lora.pair(params)  # type: ignore[attr-defined]
        return plain

    def low_rank(self, lora: Method, params: Params) -> tuple[Tensor, Tensor, float] | None:
        """(A, B, scale) of the plain pair as which it acts, or None; see `Method.low_rank`."""
        return None

    def trains_as_pair(self, lora: Method) -> bool:
        """Whether it acts as `low_rank` says in training too, but for the dropout of its input."""
        return True

    def part(
        self, lora: Method, params: Params, W: Tensor, bias: Tensor | None, training: bool
    ) -> AnyPart | None:
        """Base layer and contribution as part of one node, or None; see `Method.part`."""
        return None

    def penalty(self, config: Any, sites: Iterable[Params]) -> Tensor | None:
        """What it adds to the loss in training, or None."""
        return None

    def add(
        self,
        lora: Method,
        params: Params,
        y: Tensor,
        x: Tensor,
        training: bool,
        base: Tensor | None,
    ) -> Tensor:
        """``y`` plus the contribution, dropout included; ``base`` is given when `needs_base`."""
        raise NotImplementedError(f"{type(self).__name__} must define `add`")

    def delta(self, lora: Method, params: Params, W: Tensor | None) -> Tensor:
        """ΔW in the weight's layout; ``W`` is given when `needs_weight`."""
        raise NotImplementedError(f"{type(self).__name__} must define `delta`")

    def add_delta(self, lora: Method, params: Params, value: Tensor, W: Tensor | None) -> Tensor:
        """``value`` plus the `delta`, in ``value``'s dtype; overridden where it fuses."""
        return value + self.delta(lora, params, W).to(value.dtype)


VARIANTS: Registry[Variant] = Registry("LoRA variant")

V = TypeVar("V", bound=type[Variant])


def variant(name: str) -> Callable[[V], V]:
    """Register a variant class; one stateless instance serves all sites."""

    def add(cls: V) -> V:
        cls.name = name
        VARIANTS.register(name, cls())
        return cls

    return add


def check_options(config: Any) -> None:
    """Let every variant check its options in this config, and the config name at most one.

    Raises:
        ConfigError: a value is not allowed.
        UnsupportedError: it asks for more than one variant.
    """
    for _, each in VARIANTS.items():
        each.check(config)
    variant_for(config)


def variant_for(config: Any) -> Variant | None:
    """The variant that this config asks for.

    Raises:
        UnsupportedError: it asks for more than one.
    """
    chosen = [v for _, v in VARIANTS.items() if v.selected(config)]
    if len(chosen) > 1:
        names = ", ".join(f"`{v.name}`" for v in chosen)
        raise UnsupportedError(f"LoRA variants {names} cannot be combined; choose one of them.")
    return chosen[0] if chosen else None
