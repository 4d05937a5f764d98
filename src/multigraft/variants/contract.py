"""What a variant is: another way to use LoRA's pair of factors at a site.

LoRA makes A and B, scales and drops out; a variant may add tensors and says how the pair acts. At
most one acts per adapter; each is one file, chosen by the options of the config that name it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from multigraft.errors import UnsupportedError
from multigraft.methods.contract import Method, Params, TensorSpec
from multigraft.registry import Registry


class Variant:
    """Base of every variant. ``lora`` is the LoRA instance at the site: rank, scaling, factors."""

    name: ClassVar[str]
    needs_weight: ClassVar[bool] = False
    needs_base: ClassVar[bool] = False
    has_exact_gradients: ClassVar[bool] = True
    mergeable: ClassVar[bool] = True
    is_pair: ClassVar[bool] = False
    """Whether its tensors stand for a plain pair, which `pair` gives: it runs, merges and is served
    as that pair, and defines neither `add` nor `delta`."""
    combines: ClassVar[bool] = False
    """Whether adapters of it can be combined: `reset` gives, for any pair, tensors with which the
    variant acts as the plain pair does, and changes of them add up."""

    @classmethod
    def selected(cls, config: Any) -> bool:
        """Whether this config asks for the variant."""
        raise NotImplementedError(f"{cls.__name__} must define `selected`")

    def refusal(self, lora: Method) -> str | None:
        """Why the variant cannot act at this site, or ``None``."""
        return None

    def tensors(self, lora: Method) -> dict[str, TensorSpec]:
        """Tensors beside A and B."""
        return {}

    def reset(self, lora: Method, params: Params) -> None:
        """Fill them; A and B have their initial values by then."""

    def pair(self, lora: Method, params: Params) -> tuple[Tensor, Tensor]:
        """The plain A and B that its tensors stand for."""
        return params[lora.geometry.factors[0]], params[lora.geometry.factors[1]]

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


VARIANTS: Registry[Variant] = Registry("LoRA variant")

V = TypeVar("V", bound=type[Variant])


def variant(name: str) -> Callable[[V], V]:
    """Register a variant class; one stateless instance serves all sites."""

    def add(cls: V) -> V:
        cls.name = name
        VARIANTS.register(name, cls())
        return cls

    return add


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
